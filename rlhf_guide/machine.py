"""What this machine offers: usable cores, free memory, free disk. Containers count."""

import ctypes
import os
import platform
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

# Options of glibc's mallopt, from its malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def usable_cores() -> int:
    """The cores this process may use: its affinity, and a container's CPU quota, count."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows
        cores = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def free_memory_gib() -> float:
    """Memory that can be had without swapping, in GiB; a container's limit counts."""
    available = psutil.virtual_memory().available
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return available / 2**30
    return min(available, max(0, limit - used)) / 2**30


def free_disk_gib(path: Path) -> float:
    """Free space of the file system that holds a path (or its nearest existing parent), in GiB."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free / 2**30


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for the next tensor; True where that was done.

    glibc gives large blocks back to the kernel at once. A training step on a CPU allocates and
    frees hundreds of MB of activations, and every page of them would be faulted in anew, zeroed, in
    every step; on a virtual machine that is a tenth of the time and more. Peak memory is the same:
    what was freed is what the next step takes. Elsewhere than on glibc nothing is changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return all(
        library.mallopt(*option) for option in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1))
    )


def children_rss_gib() -> float:
    """Resident memory of all descendants of this process now, in GiB: the running kernel's."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            total += process.memory_info().rss
        except psutil.Error:  # it ended between the two calls
            continue
    return total / 2**30


@contextmanager
def peak_memory(every: float = 0.5) -> Iterator[dict[str, float]]:
    """Watch the children's memory from a thread: `{"gib": ...}` holds the largest sum so far."""
    peak = {"gib": 0.0}
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(every):
            peak["gib"] = max(peak["gib"], children_rss_gib())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
