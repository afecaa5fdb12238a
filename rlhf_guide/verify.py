"""Is this machine ready? Versions, device, data type and why, weights, disk, memory, a profile."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import GuideError
from .machine import free_disk_gib, free_memory_gib, usable_cores
from .workspace import default_run_dir, versions

# What a cpu run needs, with room to spare: adapters, four merged models, one process at a time.
CPU_MEMORY_GIB = 8.0  # above the peak that the published run measured, see `timings.json`
CPU_DISK_GIB = 6.0
GPU_MEMORY_GIB = 70.0


@dataclass(frozen=True)
class Check:
    """One line of the report: what was looked at, what was found, whether it will do."""

    name: str
    found: str
    ok: bool


def verify() -> list[Check]:
    """Look at everything the course needs; never raises for something that is missing."""
    from .models import choose_device

    device, dtype, reason = choose_device("auto")
    memory, disk = free_memory_gib(), free_disk_gib(default_run_dir("cpu"))
    found = versions()
    missing = [name for name, version in found.items() if version is None]
    return [
        Check(
            "versions", ", ".join(f"{k} {v or 'missing'}" for k, v in found.items()), not missing
        ),
        Check("device", f"{device}, {usable_cores()} cores", True),
        Check("data type", f"{str(dtype).removeprefix('torch.')}: {reason}", True),
        _attempt("weights", _weights),
        Check("free memory", _against(memory, CPU_MEMORY_GIB), memory >= CPU_MEMORY_GIB),
        Check("free disk", _against(disk, CPU_DISK_GIB), disk >= CPU_DISK_GIB),
        Check("recommended profile", recommend(device.type, memory), True),
    ]


def _attempt(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, look(), True)
    except GuideError as error:
        return Check(name, str(error), False)


def _weights() -> str:
    from .embedded import weights_file

    file: Path = weights_file()
    return f"{file.name}, {file.stat().st_size / 1e6:.0f} MB, sha256 as expected"


def _against(found: float, wanted: float) -> str:
    return f"{found:.1f} GiB; profile cpu wants {wanted:.0f} GiB"


def recommend(device: str, memory_gib: float) -> str:
    """The profile for a machine, with the reason."""
    if device == "cuda":
        gpu = _gpu_memory_gib()
        if gpu >= GPU_MEMORY_GIB:
            return f"gpu (its {gpu:.0f} GiB hold a 1.7B model, generation included)"
        return f"cpu (its settings also fit this GPU; profile gpu wants {GPU_MEMORY_GIB:.0f} GiB)"
    if memory_gib < CPU_MEMORY_GIB:
        return "smoke (too little free memory for the real model: close programs, then cpu)"
    return "cpu (SmolLM2-135M-Instruct, no GPU and no network needed)"


def _gpu_memory_gib() -> float:
    import torch

    return torch.cuda.get_device_properties(0).total_memory / 2**30


def as_text(checks: list[Check]) -> str:
    """The checks as lines for a terminal."""
    width = max(len(check.name) for check in checks)
    mark = {True: "ok ", False: "NOT"}
    return "\n".join(f"{mark[c.ok]}  {c.name:<{width}}  {c.found}" for c in checks)


def as_markdown(checks: list[Check]) -> str:
    """The checks as a Markdown table for a notebook."""
    rows = [f"| {check.name} | {check.found} | {'✓' if check.ok else '✗'} |" for check in checks]
    return "\n".join(["| | found | |", "|---|---|---|", *rows])
