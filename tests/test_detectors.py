"""Each detector passes on healthy numbers and fires on broken ones, on either side of its line."""

import pytest

from rlhf_guide import detectors
from rlhf_guide.errors import DataError

END, BOS = 2, 1
UP = [[0.0, 1.0, 2.0], [5.0, 6.0, 7.0]]
UNRELATED = [[1.0, 3.0, 1.0], [0.0, 2.0, 0.0]]
PROMPTS = [{"prompt_id": "a"}, {"prompt_id": "b"}]

CASES = {
    "no_end_token": (([[-100, 5, END]], END), ([[-100, 5, -100]], END)),
    "doubled_bos": (([[BOS, 7, BOS]], BOS), ([[BOS, BOS, 7]], BOS)),
    "swapped_labels": (([1.0, 2.0], [0.0, 3.0]), ([0.0, 0.0], [1.0, 0.0])),
    "truncated_pairs": (([[1, 2]], [[1, 3]]), ([[1], [1]], [[1], [2]])),
    "contaminated_packing": (([1.0, 2.0], [1.0, 2.0005]), ([1.0, 2.0], [1.0, 2.002])),
    "beta_too_small": (([9.0, 1.8], 1.8), ([0.0, 1.9], 1.8)),
    "learning_rate_too_high": (([0.69, 2.0, 0.6, 0.6],), ([0.69, 0.6, 2.0, 2.0],)),
    "moving_reference": (([0.0, 1.0, 1.0, 1.1],), ([0.0, 0.5, 1.0, 2.0],)),
    "length_hack": ((UNRELATED, UP), (UP, UP)),
    "noisy_reward_model": ((UP, UP), (UNRELATED, UP)),
    "stale_data": (([0.1, 0.5],), ([0.6, 0.1],)),
    "leaked_prompts": (([], PROMPTS), ([{"prompt_id": "b"}], PROMPTS)),
}


@pytest.mark.parametrize("name", CASES)
def test_passes_on_healthy_and_fires_on_broken(name):
    healthy, broken = (getattr(detectors, name)(*given) for given in CASES[name])
    assert not healthy.fired, healthy
    assert broken.fired, broken
    assert broken.diagnosis
    assert broken.remedy


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("no_end_token", ([], END)),
        ("swapped_labels", ([], [])),
        ("contaminated_packing", ([1.0], [])),
        ("beta_too_small", ([], 1.0)),
        ("learning_rate_too_high", ([],)),
        ("length_hack", ([[1.0, 1.0]], [[1.0, 2.0]])),
    ],
)
def test_nothing_measured_is_no_pass(name, given):
    with pytest.raises(DataError):
        getattr(detectors, name)(*given)


def test_a_loss_that_is_not_a_number_fires():
    assert detectors.learning_rate_too_high([0.7, float("nan")]).fired


def test_levels_between_prompts_do_not_count():
    """Longer answers to prompts with higher rewards are no length hack."""
    assert abs(detectors.length_hack(UNRELATED, [[1, 1, 2], [91, 91, 90]]).value) < 0.5
