"""The length-controlled win rate recovers what a planted length bias hides."""

import numpy as np
import pytest

from rlhf_guide.errors import DataError
from rlhf_guide.length_control import length_controlled_win_rate

MARGIN = 0.02  # two percentage points


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def judged_world(seed, bias, longer_by=120.0, easiness=0.0, length_follows=0.0, n=20_000):
    """Verdicts with a known quality and length bias; returns them with the win rate they hide.

    `easiness` is the spread of the prompts, in logits; with `length_follows` the policy writes
    more where it wins anyway.
    """
    rng = np.random.default_rng(seed)
    prompt = easiness * rng.normal(size=n)
    baseline = rng.gamma(9.0, 40.0, n)
    lengths = baseline + longer_by + rng.normal(0.0, 150.0, n) + length_follows * prompt
    delta = lengths - baseline
    quality = -0.4 + prompt
    chance = sigmoid(quality + bias * np.tanh(delta / delta.std()))
    verdicts = (rng.random(n) < chance).astype(float)
    return verdicts, lengths, baseline, sigmoid(quality).mean()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("easiness", [0.0, 1.5])
def test_a_planted_length_bias_is_removed(seed, easiness):
    """Also where prompts differ much in difficulty, as long as length does not follow it."""
    *judged, truth = judged_world(seed, bias=1.5, easiness=easiness)
    found = length_controlled_win_rate(*judged, n_boot=50)
    assert abs(found["raw"] - truth) > 5 * MARGIN
    assert abs(found["value"] - truth) < MARGIN
    assert found["length_effect"] > 0.8


@pytest.mark.parametrize("seed", range(3))
def test_without_bias_nothing_is_corrected(seed):
    *judged, truth = judged_world(seed, bias=0.0)
    found = length_controlled_win_rate(*judged, n_boot=50)
    assert abs(found["raw"] - truth) < MARGIN
    assert abs(found["value"] - found["raw"]) < MARGIN


def test_length_that_follows_easy_prompts_is_corrected_too_much():
    """The limit that the docstring states: part of an honest win is taken for length."""
    *judged, truth = judged_world(0, bias=0.0, easiness=1.5, length_follows=150.0)
    found = length_controlled_win_rate(*judged, n_boot=50)
    assert found["raw"] == pytest.approx(truth, abs=MARGIN)
    assert found["value"] < truth - 2 * MARGIN


def test_soft_preferences_are_fitted_as_they_are():
    rng = np.random.default_rng(0)
    lengths = rng.normal(300.0, 80.0, 500)
    feature = np.tanh((lengths - 280.0) / lengths.std())
    preferences = sigmoid(0.3 + 1.1 * feature)
    found = length_controlled_win_rate(preferences, lengths, np.full(500, 280.0), n_boot=20)
    assert found["value"] == pytest.approx(sigmoid(0.3), abs=1e-4)
    assert found["length_effect"] == pytest.approx(1.1, abs=1e-3)


def test_the_two_sides_add_up_to_one():
    preferences, lengths, baseline, _ = judged_world(1, bias=1.0, n=300)
    ours = length_controlled_win_rate(preferences, lengths, baseline, n_boot=200)
    theirs = length_controlled_win_rate(1 - preferences, baseline, lengths, n_boot=200)
    assert ours["value"] + theirs["value"] == pytest.approx(1.0, abs=1e-6)
    assert ours["low"] + theirs["high"] == pytest.approx(1.0, abs=1e-6)


def test_the_unit_of_length_does_not_matter():
    preferences, lengths, baseline, _ = judged_world(2, bias=1.0, n=300)
    in_characters = length_controlled_win_rate(preferences, lengths, baseline, n_boot=100)
    in_tokens = length_controlled_win_rate(preferences, lengths / 4, baseline / 4, n_boot=100)
    assert in_characters == pytest.approx(in_tokens)


def test_whole_prompts_are_redrawn():
    preferences, lengths, baseline, _ = judged_world(3, bias=1.0, n=120)
    once = length_controlled_win_rate(preferences, lengths, baseline)
    four = [np.tile(column, 4) for column in (preferences, lengths, baseline)]
    copies = length_controlled_win_rate(*four, prompt_ids=np.tile(np.arange(120), 4))
    assert copies["n"] == once["n"] == 120
    assert copies["value"] == pytest.approx(once["value"], abs=2e-3)
    width, expected = copies["high"] - copies["low"], once["high"] - once["low"]
    assert width == pytest.approx(expected, rel=0.05)
    alone = length_controlled_win_rate(*four)
    assert alone["high"] - alone["low"] < 0.6 * width


def test_the_interval_covers_the_planted_win_rate():
    hits = 0
    for seed in range(200):
        *judged, truth = judged_world(seed, bias=1.0, n=150)
        found = length_controlled_win_rate(*judged, n_boot=300, seed=seed)
        hits += found["low"] <= truth <= found["high"]
    assert 0.90 <= hits / 200 <= 0.99


def test_perfect_separation_stays_finite():
    rng = np.random.default_rng(0)
    delta = rng.normal(0.0, 50.0, 60)
    lengths, baseline = 300.0 + delta, np.full(60, 300.0)
    always = length_controlled_win_rate(np.ones(60), lengths, baseline, n_boot=200)
    assert 0.99 < always["low"] <= always["value"] <= always["high"] <= 1
    by_length = length_controlled_win_rate((delta > 0).astype(float), lengths, baseline, n_boot=200)
    assert abs(by_length["value"] - 0.5) < 0.1
    assert np.isfinite(list(by_length.values())).all()


def test_one_huge_difference_among_tiny_ones_stays_finite():
    lengths = np.array([1e6, *range(1, 31)], dtype=float)
    verdicts = np.array([0.0] + [1.0] * 30)
    found = length_controlled_win_rate(verdicts, lengths, np.zeros(31), n_boot=200)
    assert np.isfinite(list(found.values())).all()
    assert found["value"] > 0.9


def test_an_extrapolation_is_visible():
    preferences, lengths, baseline, _ = judged_world(4, bias=1.0, longer_by=2000.0, n=200)
    assert length_controlled_win_rate(preferences, lengths, baseline, n_boot=20)["longer"] == 1


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (([1, 0], [5, 6, 7], [5, 6]), "2 preferences, 3 lengths and 2 baseline lengths"),
        (([], [], []), "0 preferences"),
        (([1, 2], [5, 6], [5, 7]), r"lie in \[0, 1\]"),
        (([1, float("nan")], [5, 6], [5, 7]), "leave out comparisons"),
        (([1, 0], [5, float("inf")], [5, 7]), "be finite"),
        (([1, 0], [7, 8], [5, 6]), "differs from the baseline's by 2,"),
    ],
)
def test_what_cannot_be_fitted_is_refused(columns, message):
    with pytest.raises(DataError, match=message):
        length_controlled_win_rate(*columns)


def test_prompt_ids_must_match():
    with pytest.raises(DataError, match="2 preferences but 1 prompt ids"):
        length_controlled_win_rate([1, 0], [5, 6], [5, 7], prompt_ids=["a"])
