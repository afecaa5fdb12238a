"""Packing plans: nothing lost, nothing overfull, and best-fit-decreasing as TRL does it."""

import time

import numpy as np
import pytest
from datasets import Dataset
from trl import pack_dataset

from rlhf_guide.errors import DataError
from rlhf_guide.packing import (
    best_fit_decreasing,
    fill,
    first_fit,
    long_tailed_lengths,
)

STRATEGIES = (first_fit, best_fit_decreasing)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("block", [7, 64, 1000])
def test_every_conversation_has_one_block_and_no_block_overflows(strategy, block):
    for seed in range(5):
        lengths = np.random.default_rng(seed).integers(1, block + 1, 300)
        plan = strategy(lengths, block)
        held = np.bincount(plan, weights=lengths)
        assert len(plan) == len(lengths)
        assert held.max() <= block
        assert held.min() > 0  # no block is skipped
        assert fill(plan, lengths, block) == pytest.approx(held.sum() / (len(held) * block))


def test_first_fit_by_hand():
    assert first_fit([4, 4, 6, 2, 5], 8).tolist() == [0, 0, 1, 1, 2]
    assert first_fit(sorted([4, 4, 6, 2, 5], reverse=True), 8).tolist() == [0, 1, 2, 2, 0]


def test_best_fit_takes_the_tightest_room():
    # 6 and 5 open a block each. 3 fits only behind 5 and fills it; 2 fits only behind 6.
    assert best_fit_decreasing([2, 3, 5, 6], 8).tolist() == [0, 1, 1, 0]
    # One room for a whole group: five 3s take ceil(5 / 2) = 3 blocks, two each.
    assert np.bincount(best_fit_decreasing([3] * 5, 8)).tolist() == [2, 2, 1]


@pytest.mark.parametrize("seed", range(4))
def test_best_fit_decreasing_fills_blocks_as_trl_does(seed):
    """Same rooms left, block by block, wherever TRL sees all conversations at once."""
    block = 256
    lengths = long_tailed_lengths(900, block, seed)
    rows = Dataset.from_dict({"input_ids": [[0] * n for n in lengths]})
    trl = [len(ids) for ids in pack_dataset(rows, block, "bfd")["input_ids"]]
    ours = np.bincount(best_fit_decreasing(lengths, block), weights=lengths)
    assert sorted(trl) == sorted(ours)


def test_the_published_mix_is_long_tailed_and_fills_its_blocks():
    lengths = long_tailed_lengths(20_000, 1024)
    assert (lengths.min(), lengths.max()) == (8, 1024)
    assert np.median(lengths) == pytest.approx(64, rel=0.05)
    assert lengths.mean() > 1.7 * np.median(lengths)
    assert fill(best_fit_decreasing(lengths, 1024), lengths, 1024) >= 0.98
    np.testing.assert_array_equal(lengths[:100], long_tailed_lengths(100, 1024))


def test_a_hundred_thousand_conversations_are_planned_in_seconds():
    """A quadratic planner takes minutes; tests/benchmarks/packing.py times a million."""
    lengths = long_tailed_lengths(100_000, 8192)
    started = time.process_time()
    best_fit_decreasing(lengths, 8192)
    assert time.process_time() - started < 5


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_lengths_that_cannot_be_packed_are_refused(strategy):
    with pytest.raises(DataError, match="nothing to pack"):
        strategy([], 8)
    for bad in ([3, 9], [0, 3]):
        with pytest.raises(DataError, match="a block takes 1 to 8"):
            strategy(bad, 8)
