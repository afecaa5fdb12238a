"""The slow tier: marked as such, one undisturbed smoke run shared by all."""

import os
from pathlib import Path

import pytest
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
def undisturbed(tmp_path_factory, only):
    """The folder of a smoke run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed") / "smoke"
    finish(folder, only)
    return folder
