"""The best-of-n estimator against brute force, and the bound on its divergence."""

from itertools import combinations

import numpy as np
import pytest

from rlhf_guide.best_of_n import best_of_n, kl_bound, mean_gain
from rlhf_guide.errors import DataError


def brute_force(rewards, values, n):
    """Mean over all subsets; among equal rewards the value is the mean of the tied answers."""
    tied = [np.mean([v for r, v in zip(rewards, values, strict=True) if r == s]) for s in rewards]
    subsets = list(combinations(range(len(rewards)), n))
    return np.mean([tied[max(subset, key=lambda i: rewards[i])] for subset in subsets])


@pytest.mark.parametrize("rewards", [[0.3, -1.0, 2.0, 0.9, 0.1], [1.0, 1.0, 0.0, 2.0, 2.0]])
def test_estimator_equals_the_mean_over_all_subsets(rewards):
    values = [5.0, 1.0, -2.0, 0.5, 3.0]
    curve = best_of_n(rewards, values)
    assert curve == pytest.approx([brute_force(rewards, values, n) for n in range(1, 6)])


def test_ends_of_the_curve():
    rewards, values = [1.0, 3.0, 2.0], [10.0, 20.0, 60.0]
    curve = best_of_n(rewards, values)
    assert curve[0] == pytest.approx(30)
    assert curve[-1] == pytest.approx(20)


def test_the_reward_of_the_chosen_answer_never_falls():
    rewards = np.random.default_rng(0).normal(size=16)
    assert (np.diff(best_of_n(rewards, rewards)) >= 0).all()


def test_equal_rewards_choose_nothing():
    assert best_of_n([1, 1, 1], [1, 2, 6]) == pytest.approx([3, 3, 3])


def test_estimator_is_unbiased():
    rng = np.random.default_rng(1)
    draws = rng.normal(size=(4000, 6))
    curves = np.mean([best_of_n(row, row) for row in draws], axis=0)
    fresh = [rng.normal(size=(20000, n)).max(axis=1).mean() for n in range(1, 7)]
    assert curves == pytest.approx(fresh, abs=0.04)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="2 rewards and 1 values"):
        best_of_n([1, 2], [1])


@pytest.mark.parametrize("n", [1, 2, 4, 8, 64])
def test_divergence_stays_below_its_bound(n):
    """Exact KL on a categorical policy with distinct rewards (outcomes sorted by reward)."""
    start = np.random.default_rng(n).dirichlet(np.ones(50))
    cumulative = np.cumsum(start)
    chosen = cumulative**n - np.concatenate([[0], cumulative[:-1]]) ** n
    positive = chosen > 0
    exact = float((chosen[positive] * np.log(chosen[positive] / start[positive])).sum())
    assert -1e-9 <= exact <= kl_bound(n) + 1e-9


def test_bound_for_eight_samples():
    assert kl_bound(8) == pytest.approx(1.204, abs=1e-3)


def test_mean_gain_starts_at_zero_and_leaves_out_short_prompts():
    rewards = [[1.0, 2.0, 3.0], [3.0, 1.0, 2.0], [1.0, 2.0]]
    values = [[0.0, 3.0, 6.0], [6.0, 0.0, 3.0], [9.0, 9.0]]
    gain = mean_gain(rewards, values, max_n=3, n_boot=100)
    assert gain["short"] == 1
    assert gain["curves"].shape == (2, 3)
    np.testing.assert_allclose(gain["value"], [0, 2, 3])  # best of 1: 3, of 2: 5, of 3: 6
    np.testing.assert_allclose(gain["low"], gain["high"], err_msg="both prompts gain alike")
    with pytest.raises(DataError, match=r"no prompt of 3 has 4 answers"):
        mean_gain(rewards, values, max_n=4)
