"""Other ways to compute the attention of transformers' models, each for as long as it is wanted.

transformers looks its attention up by name in each layer. What stands under "sdpa" can therefore be
replaced for a while, with no change to a model:

    with attention_by_products():
        model(input_ids)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SHORT_ROW = 512  # tokens; attention weights grow with their square

# (module, query, key, value, mask, **options) to (output (rows, tokens, heads, size), weights)
Attention = Callable[..., tuple[torch.Tensor, None]]


@contextmanager
def replace_attention(make: Callable[[Attention], Attention]) -> Iterator[None]:
    """Put `make(usual)` in the place of the usual attention, which returns afterwards."""
    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = make(usual)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = usual


def attention_by_products() -> AbstractContextManager[None]:
    """On a CPU in bfloat16, attention over at most 512 tokens as two products and a softmax.

    PyTorch's fused kernel takes about twice as long there, and up to four times with its backward
    pass; what a whole step of DPO loses by it is the `attention_ratio` of
    tests/benchmarks/online.py. What the kernel saves is the memory of the attention weights, of
    which short rows need little. Query heads that share keys and values are the rows of one
    product. Rounding is that of transformers' own "eager" attention.
    """
    return replace_attention(_Products)


class _Products:
    """softmax(Q Kᵀ · scaling + mask) V where that is faster, and the usual attention elsewhere."""

    def __init__(self, usual: Attention) -> None:
        self.usual = usual
        self.length, self.mask, self.added = 0, None, torch.empty(0)

    def __call__(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        rows, heads, tokens, size = query.shape
        groups, length = key.shape[1:3]
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        described = attention_mask is not None or (causal and tokens == length)
        alike = attention_mask is None or attention_mask.shape[1] == 1  # for all heads
        short = query.device.type == "cpu" and query.dtype == torch.bfloat16 and length <= SHORT_ROW
        if (
            dropout
            or not (described and alike and short)
            or options.get("position_bias") is not None
        ):
            options |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
            return self.usual(module, query, key, value, attention_mask, **options)
        scaled = query * (size**-0.5 if scaling is None else scaling)
        scores = scaled.reshape(rows, groups, -1, size) @ key.transpose(2, 3)
        added = self._added(attention_mask, length, query.dtype)
        scores.view(rows, groups, -1, tokens, length).add_(added[:, :, None])
        output = torch.softmax(scores, dim=-1) @ value
        return output.reshape(rows, heads, tokens, -1).transpose(1, 2), None

    def _added(self, mask: torch.Tensor | None, length: int, dtype: torch.dtype) -> torch.Tensor:
        """What the mask adds to the scores: next to nothing is left of what is not seen."""
        if mask is not None and mask.dtype != torch.bool:
            return mask
        if self.length != length or self.mask is not mask:  # all layers have the same
            seen = (
                torch.ones(1, 1, length, length, dtype=torch.bool).tril() if mask is None else mask
            )
            lowest = torch.finfo(dtype).min  # and not −∞: a row of padding may see nothing at all
            self.added = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, lowest)
            self.length, self.mask = length, mask
        return self.added


def sees_whole_past(model: PreTrainedModel) -> bool:
    """Whether all layers attend to the whole past, so that a mask can say what they see."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    return kinds == {"full_attention"} and not window and config._attn_implementation == "sdpa"
