"""The fast tests in random order: no test leans on another, none fails now and then."""

import os
import subprocess
import sys

import pytest
from smoke_run import ROOT

ROUNDS = int(os.environ.get("RLHF_GUIDE_SLOW_ROUNDS", "20"))
# Some test files instead of all, to try this file itself.
FILES = os.environ.get("RLHF_GUIDE_SLOW_FILES", "tests").split()


@pytest.mark.parametrize("seed", range(1, ROUNDS + 1))
def test_fast_tests_pass_in_any_order(seed):
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *FILES]
    line += ["-m", "not slow and not chain and not trains"]
    environment = {**os.environ, "RLHF_GUIDE_TEST_ORDER": str(seed)}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
