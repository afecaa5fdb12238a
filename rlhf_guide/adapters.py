"""LoRA adapters whose weights are float32 and whose products are not.

PEFT 0.21 converts what enters an adapter to the type of the adapter's weights. With a bfloat16
model and float32 adapters it so carries two wide copies of every activation around, and on a CPU
the adapters, 2% of the arithmetic, take as long as the layers they adapt.
"""

from contextlib import nullcontext
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class InputTypeLinear(Linear):
    """PEFT's adapted linear layer, W x + (α/r) B A x, multiplied in the type of x.

    A and B stay float32, and so do their gradients and updates: only the products are rounded, as
    the layer's own are. With a float32 x nothing differs from PEFT.
    """

    def forward(self, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        """The layer's output, in the type of x; PEFT's own way unless one adapter is in use."""
        if self.disable_adapters or self.merged or options or len(self.active_adapters) != 1:
            return super().forward(x, *args, **options)
        name = self.active_adapters[0]
        whole = self.base_layer(x, *args)
        wide = x.dtype == torch.float32
        # Through the modules, not their weights: sharding hangs on their calls.
        with nullcontext() if wide else torch.autocast(x.device.type, x.dtype):
            narrow = self.lora_A[name](self.lora_dropout[name](x))
            return whole + self.lora_B[name](narrow * self.scaling[name])


def lora_config(rank: int, task_type: str = "CAUSAL_LM", **options: Any) -> LoraConfig:
    """Low-rank adapters on all attention and MLP projections, scaled by α/r = 2.

    Without dropout: it would make the policy differ from its reference before the first step.
    """
    options.setdefault("target_modules", PROJECTIONS)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, task_type=task_type, **options
    )
    config._register_custom_module({torch.nn.Linear: InputTypeLinear})
    return config
