"""How fast the machine can multiply, and what a training step makes of it.

A transformer's work is matrix products, so their rate on this machine is the ceiling of every
training step. `matmul_rate` measures it, `step_flops` counts the products that one batch really
needs, and `step_shares` says where the rest of the time goes.
"""

import os
import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from rlhf_guide.attention import attention_by_products

PRODUCTS = ("addmm", "::mm", "mkl_linear", "mkldnn_linear")
ATTENTION = ("attention", "::bmm", "::_softmax")  # the last two: of `attention_by_products`


def matmul_rate(dtype: torch.dtype, size: int = 1024, seconds: float = 0.5) -> float:
    """Products of square matrices of `size`, in floating-point operations a second."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    left @ right  # the first product pays for choosing a kernel
    count, started = 0, _now()
    while _now() - started < seconds:
        left @ right
        count += 1
    return 2 * size**3 * count / (_now() - started)


def step_flops(trainer: Any, batch: dict[str, Any]) -> int:
    """Operations in the matrix products of one batch, forward and backward.

    Counted as they run, so adapters (no gradient for frozen weights) and the vocabulary's head are
    in it as they are.
    """
    # TRL's loss accumulates a gradient in place, which PyTorch's counter does not know.
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops})
    with counter:
        _forward_backward(trainer, batch)
    return counter.get_total_flops()


def _addmm_flops(_total: Any, left: torch.Size, right: torch.Size, **_: Any) -> int:
    """Operations of `total += left @ right`, from the operands' shapes."""
    return 2 * left[0] * left[1] * right[1]


def step_shares(trainer: Any, batch: dict[str, Any]) -> dict[str, float]:
    """Shares of one batch's time, forward and backward: products, attention and the rest.

    Counted on the CPU's clock or, with CUDA, on the GPU's.
    """
    cuda = torch.cuda.is_available()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes its log to the page
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities) as run:
        _forward_backward(trainer, batch)
    times = dict.fromkeys(("matrix products", "attention", "everything else"), 0.0)
    for event in run.key_averages():
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        times[_kind(event.key)] += spent
    total = sum(times.values())
    return {kind: spent / total for kind, spent in times.items()}


def _kind(operation: str) -> str:
    if any(part in operation for part in ATTENTION):
        return "attention"
    if any(part in operation for part in PRODUCTS):
        return "matrix products"
    return "everything else"


def _forward_backward(trainer: Any, batch: dict[str, Any]) -> None:
    inputs = trainer._prepare_inputs(dict(batch))
    with attention_by_products():  # as in training
        trainer.compute_loss(trainer.model, inputs).backward()
    trainer.model.zero_grad()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
