"""The slow tier: marked as such, one undisturbed smoke run shared by all."""

import os
from pathlib import Path

import pytest
from filelock import FileLock
from smoke_run import finish

# Notebooks of the runs; fewer prove the machinery in minutes.
ONLY_VARIABLE = "RLHF_GUIDE_SLOW_ONLY"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here is slow, and may take hours."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.timeout(6 * 3600))


@pytest.fixture(scope="session")
def only():
    """The notebooks to run: all of them, or RLHF_GUIDE_SLOW_ONLY."""
    return os.environ.get(ONLY_VARIABLE)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, worker_id, only):
    """The folder of a smoke run that nothing disturbed; test processes share one."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "undisturbed" / "smoke"
    done = folder.with_name("done")
    with FileLock(str(folder.parent) + ".lock"):
        if not done.exists():
            finish(folder, only)
            done.touch()
    return folder
