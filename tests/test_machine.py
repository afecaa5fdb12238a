"""Freed memory stays with the process, so that a training step does not fault its pages in anew."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from rlhf_guide.machine import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in (3, 10, 20) * 5:
        torch.empty(size * 1_000_000).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

kept = keep_freed_memory() if sys.argv[1] == "keep" else False
faults()
print(kept, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_large_tensors_reuse_freed_memory():
    def faults(how):
        command = [sys.executable, "-c", FAULTS, how]
        kept, count = subprocess.check_output(command, text=True).split()
        assert kept == str(how == "keep")
        return int(count)

    assert faults("keep") < 0.5 * faults("default")
