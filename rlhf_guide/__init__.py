"""Helpers behind the notebooks of the RLHF Guide: one module a stage, no lesson hidden.

Importing this package loads no torch, so that the command line and the strict parameter checks
answer at once.
"""

__version__ = "0.1.0"
