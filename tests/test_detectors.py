"""Each detector passes on one side of its limit and fires on the other; limits hold at chance."""

import math

import numpy as np
import pytest

from rlhf_guide import detectors
from rlhf_guide.errors import DataError

END, BOS = 2, 1
PROMPTS = [{"prompt_id": "a"}, {"prompt_id": "b"}]
ROUND = detectors.ROUNDING


def right(count, of=100):
    """Rewards of `of` pairs, of which `count` are ordered rightly."""
    return [1.0] * count + [-1.0] * (of - count), [0.0] * of


def longer(count, of=100):
    """The same for pairs with a shorter better answer; in `count` the reward takes the longer."""
    return *right(of - count, of), [5] * of, [9] * of


CASES = {
    "no_end_token": (([[-100, 5, END]], END), ([[-100, 5, END], [-100, 5, -100]], END)),
    "doubled_bos": (([[BOS, 7, BOS]], BOS), ([[BOS, 7], [BOS, BOS, 7]], BOS)),
    "contaminated_packing": (([1, 2], [1, 2 + 0.9 * ROUND]), ([1, 2], [1, 2 + 1.1 * ROUND])),
    "truncated_pairs": (([[1, 2]], [[1, 3]]), ([[1], [1]], [[1], [2]])),
    "swapped_labels": (right(42), right(41)),
    "noisy_reward_model": (right(59), right(58)),
    "length_hack": (longer(58), longer(59)),
    "learning_rate_too_high": (([0.9, 0.48],), ([0.9, 0.49],)),
    "beta_too_small": ((1.8, 1.8), (1.9, 1.8)),
    "moving_reference": ((2.0, 1.0, 0.5), (2.1, 1.0, 0.5)),
    "stale_data": (([0.0, 2.0], [2.9, 4.9]), ([0.0, 2.0], [3.1, 5.1])),
    "leaked_prompts": (([], PROMPTS), ([{"prompt_id": "b"}], PROMPTS)),
}


@pytest.mark.parametrize("name", CASES)
def test_passes_on_healthy_and_fires_on_broken(name):
    healthy, broken = (getattr(detectors, name)(*given) for given in CASES[name])
    assert not healthy.fired, healthy
    assert broken.fired, broken
    assert healthy.limit == broken.limit
    assert broken.diagnosis
    assert broken.remedy


@pytest.mark.parametrize("name", ["swapped_labels", "noisy_reward_model", "length_hack"])
def test_limits_of_chance_hold_for_a_reward_that_guesses(name):
    """One detector of each pair is one-sided: guessing crosses its limit in one run of twenty."""
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(2000, 2, 64))
    words = ([1] * 64, [2] * 64) if name == "length_hack" else ()
    fired = np.mean([getattr(detectors, name)(*pair, *words).fired for pair in rewards])
    beyond = 1 - fired if name == "noisy_reward_model" else fired
    assert 0.02 < beyond < 0.07


def test_answers_of_one_policy_are_rarely_called_stale():
    rng = np.random.default_rng(1)
    draws = rng.normal(size=(2000, 2, 50))
    assert np.mean([detectors.stale_data(*draw).fired for draw in draws]) < 0.01


def test_length_counts_only_where_the_better_answer_is_the_shorter():
    assert not detectors.length_hack([0, 1], [1, 0], [9, 5], [5, 9]).value


def test_a_loss_that_is_not_a_number_fires():
    assert detectors.learning_rate_too_high([0.5, math.nan]).fired


def test_divergence_that_bought_nothing_fires():
    assert detectors.moving_reference(0.1, 0.0, 0.1).fired
    assert not detectors.moving_reference(0.0, 0.0, 0.1).fired


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("no_end_token", ([], END)),
        ("doubled_bos", ([], BOS)),
        ("contaminated_packing", ([], [])),
        ("contaminated_packing", ([1.0], [1.0, 2.0])),
        ("truncated_pairs", ([], [])),
        ("swapped_labels", ([], [])),
        ("length_hack", ([1.0], [0.0], [9], [5])),
        ("learning_rate_too_high", ([],)),
        ("stale_data", ([], [1.0])),
        ("stale_data", ([1.0, 1.0], [1.0, 1.0])),
        ("leaked_prompts", ([], [])),
    ],
)
def test_nothing_measured_is_no_pass(name, given):
    with pytest.raises(DataError):
        getattr(detectors, name)(*given)
