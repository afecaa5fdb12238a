"""What every test shares: one thread of computation, no hub, no network.

The cache of converted weights is the reader's own (~/.cache/rlhf_guide or RLHF_GUIDE_CACHE), so
that tests convert the weights once and not once a run.
"""

import os
import random

# Before any library reads them. One thread a process: the tests run beside one another.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A reader's own settings must not change what the tests see.
for variable in ("RLHF_GUIDE_PROFILE", "RLHF_GUIDE_RUNS", "RLHF_GUIDE_ALLOW_DOWNLOAD"):
    os.environ.pop(variable, None)

import hypothesis  # noqa: E402
import pytest  # noqa: E402

from rlhf_guide.offline import block_network, unblock_network  # noqa: E402

# Machines are shared: a slow moment is no failure.
hypothesis.settings.register_profile("course", deadline=None)
hypothesis.settings.load_profile("course")


# Test files that train or sample: seconds a test. `make fast` leaves them out.
TRAINS = {
    "test_benchmarks",
    "test_distributed",
    "test_dpo",
    "test_dpo_losses",
    "test_generation",
    "test_launch",
    "test_online",
    "test_packing",
    "test_preference_model",
    "test_reward_model",
    "test_sft",
    "test_studies",
    "test_throughput",
    "test_training",
}
ORDER_VARIABLE = "RLHF_GUIDE_TEST_ORDER"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what trains; with RLHF_GUIDE_TEST_ORDER=<seed> shuffle all tests."""
    for item in items:
        if item.path.stem in TRAINS:
            item.add_marker(pytest.mark.trains)
    if seed := os.environ.get(ORDER_VARIABLE):
        items.sort(key=lambda item: item.nodeid)
        random.Random(seed).shuffle(items)


@pytest.fixture(autouse=True)
def no_network():
    """Refuse every connection that leaves the machine, in this process."""
    block_network()
    yield
    unblock_network()
