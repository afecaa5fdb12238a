"""Intervals cover what they claim, clusters and ties count as they should."""

import numpy as np
import pytest

from rlhf_guide.errors import DataError
from rlhf_guide.evaluation import (
    bootstrap_mean,
    by_group,
    format_cell,
    instruction_pass_rate,
    judge,
    length_correlation,
    measure_name,
    paired_difference,
    pearson,
    plain,
    selection_effect,
    table,
    win_rate,
    with_measure,
)


def coverage(draw, truth: float, measure=bootstrap_mean, runs: int = 4000) -> float:
    """Share of simulated samples whose 95% interval holds the true value."""
    hits = 0
    for run in range(runs):
        found = measure(*draw(np.random.default_rng(run)))
        hits += found["low"] <= truth <= found["high"]
    return hits / runs


def clustered_sample(rng, prompts: int = 104, samples: int = 3):
    # Answers to one prompt share its difficulty, so they are far from independent.
    difficulty = np.repeat(rng.normal(0.0, 1.0, prompts), samples)
    owners = np.repeat(np.arange(prompts), samples)
    return difficulty + rng.normal(0.0, 0.5, prompts * samples), owners


def two_policies(rng):
    # A gain of 0.3 that differs from prompt to prompt; both policies share the difficulty.
    before, owners = clustered_sample(rng)
    gain = np.repeat(rng.normal(0.3, 0.5, 104), 3) + rng.normal(0.0, 0.5, len(before))
    return before + gain, before, owners


def test_intervals_cover_the_mean_of_clustered_answers():
    assert 0.93 <= coverage(clustered_sample, 0.0) <= 0.97


def test_paired_intervals_cover_the_difference():
    assert 0.93 <= coverage(two_policies, 0.3, paired_difference) <= 0.97


def test_intervals_of_few_prompts_are_too_narrow_as_the_docstring_says():
    few = coverage(lambda rng: clustered_sample(rng, prompts=24), 0.0)
    assert 0.915 <= few <= 0.94


def test_counting_answers_as_independent_loses_coverage():
    without = coverage(lambda rng: (clustered_sample(rng)[0], None), 0.0, runs=1000)
    assert without < 0.85


def test_mean_counts_clusters_and_keeps_unequal_ones_apart():
    found = bootstrap_mean([0.0, 0.0, 0.0, 1.0], ["a", "a", "a", "b"])
    assert found["value"] == 0.25
    assert found["n"] == 2
    assert (found["low"], found["high"]) == (0.0, 1.0)


def test_constant_sample_has_a_point_interval():
    found = bootstrap_mean([0.1] * 7)
    assert found["value"] == pytest.approx(0.1)
    assert found["low"] == pytest.approx(0.1)
    assert found["high"] == pytest.approx(0.1)
    assert found["low"] <= found["value"] <= found["high"]


def test_bootstrap_is_reproducible_by_seed():
    values = list(np.random.default_rng(0).normal(size=30))
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_nothing_or_nonsense_is_refused(values):
    with pytest.raises(DataError):
        bootstrap_mean(values)


def test_cluster_names_must_match_the_values():
    with pytest.raises(DataError, match="2 values but 1 cluster"):
        bootstrap_mean([1.0, 2.0], ["a"])


def test_pairing_narrows_the_interval_and_finds_a_small_gain():
    rng = np.random.default_rng(1)
    easy = rng.normal(0.0, 2.0, 100)
    before, after = easy + rng.normal(0, 0.2, 100), easy + 0.2 + rng.normal(0, 0.2, 100)
    paired = paired_difference(after, before)
    separate = bootstrap_mean(after)
    assert paired["low"] > 0
    assert paired["value"] == pytest.approx(np.mean(after) - np.mean(before))
    assert paired["high"] - paired["low"] < 0.3 * (separate["high"] - separate["low"])


def test_paired_difference_refuses_unequal_lengths():
    with pytest.raises(DataError, match="got 2 and 1"):
        paired_difference([1.0, 2.0], [1.0])


def test_win_rate_counts_ties_as_half():
    found = win_rate([3.0, 1.0, 2.0, 2.0], [1.0, 3.0, 2.0, 2.0 + 1e-12])
    assert found["value"] == 0.5
    assert found["ties"] == 0.5
    assert win_rate([1.0, 1.0], [0.0, 0.0])["value"] == 1.0
    assert win_rate([1.0], [1.0])["value"] == 0.5


def test_win_rate_of_a_against_b_and_b_against_a_sum_to_one():
    a, b = np.random.default_rng(2).normal(size=(2, 50))
    assert win_rate(a, b)["value"] + win_rate(b, a)["value"] == pytest.approx(1.0)


def test_instruction_pass_rate_leaves_out_prompts_without_one():
    found = instruction_pass_rate([True, None, False, None, True], ["a", "b", "c", "d", "e"])
    assert found["value"] == pytest.approx(2 / 3)
    assert found["n"] == 3


def test_length_correlation_of_a_length_judge_is_one():
    lengths = [[10, 20, 30], [5, 9, 40], [7, 7, 7]]
    found = length_correlation(lengths, lengths)
    assert found["value"] == pytest.approx(1.0)
    assert found["dropped"] == 1
    assert found["n"] == 2
    assert found["kept"] == [0, 1]
    assert found["mean_lengths"] == [20.0, 18.0]


def test_length_correlation_drops_equal_rewards_and_single_answers():
    found = length_correlation([[1.0, 1.0], [0.3], [2.0, 1.0]], [[5, 9], [4], [1, 2]])
    assert (found["dropped"], found["n"]) == (2, 1)
    assert found["value"] == pytest.approx(-1.0)
    with pytest.raises(DataError, match="No prompt of 1"):
        length_correlation([[1.0, 1.0]], [[1, 2]])


def test_pearson_equals_numpy_and_knows_when_it_is_undefined():
    x, y = np.random.default_rng(3).normal(size=(2, 20))
    assert pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    # 0.1 + 0.2 ≠ 0.3 in floating point: centring leaves residue, not information.
    assert pearson([0.1 + 0.2, 0.3, 0.3], [1.0, 2.0, 3.0]) is None


def test_the_best_of_identical_policies_seems_better_and_is_not():
    values, clusters = clustered_sample(np.random.default_rng(4))
    gains = [selection_effect(values, clusters, policies) for policies in (1, 4, 16)]
    apparent = [gain["apparent"] for gain in gains]
    # n answers with deviation 0.5: the best of k normal scores, in standard errors.
    error = 0.5 / np.sqrt(len(values))
    assert apparent == pytest.approx([0.0, 1.03 * error, 1.77 * error], abs=0.2 * error)
    assert all(abs(gain["fresh"]) < 0.2 * error for gain in gains)


def test_selection_needs_a_prompt_for_each_value_and_knows_single_answers():
    with pytest.raises(DataError, match="3 values but 1 cluster"):
        selection_effect([1.0, 2.0, 3.0], ["a"], 2)
    single = selection_effect([1.0, 3.0], ["a", "b"], 8)
    assert 0 < single["apparent"] <= 1.0


def test_by_group_measures_each_group():
    values = [1.0, 0.0, 1.0]
    found = by_group(["x", "y", "x"], lambda rows: bootstrap_mean([values[i] for i in rows]))
    assert list(found) == ["x", "y"]
    assert found["x"]["value"] == 1.0


def test_table_writes_intervals_in_words():
    interval = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 4, "ties": 0.0}
    text = table([{"policy": "sft", "utility": interval}, {"policy": "online", "utility": None}])
    assert text.splitlines()[0] == "| policy | utility |"
    assert "| sft | 0.500 [0.250, 0.750] |" in text
    assert format_cell(3) == "3"
    assert set(plain(interval)) == {"value", "low", "high", "n"}


def test_judge_flattens_answers_in_order():
    prompt = {
        "prompt_id": "p",
        "messages": [{"role": "user", "content": "Where is the Eiffel Tower?"}],
        "section": "chat",
        "facts": [["Paris"]],
        "instruction": None,
        "reference": "In Paris.",
    }
    answers = [("It stands in Paris.", "stop"), ("It stands in", "length")]
    responses = [
        {"text": text, "finish_reason": reason, "n_tokens": 4, "temperature": 0.7, "seed": 0}
        for text, reason in answers
    ]
    first, second = judge([{**prompt, "responses": responses}])
    assert first["utility"] > second["utility"]
    assert first["facts"] == 1.0
    assert first["kept"] is None
    assert (first["kind"], second["sample"], first["characters"]) == ("none", 1, 19)


def test_judge_takes_the_reward_where_no_truth_is_known():
    response = {"text": "Yes.", "finish_reason": "stop", "n_tokens": 3}
    row = {"prompt_id": "hub-1", "source": "shp", "messages": [], "responses": [response]}
    scored = {**row, "rewards": [1.5]}
    (judged,) = judge([scored])
    assert (judged["utility"], judged["kept"], judged["section"]) == (1.5, None, "shp")
    assert measure_name([scored]) == "reward"
    assert measure_name([{**row, "facts": []}]) == "true utility"
    with pytest.raises(DataError, match="annotate"):
        judge([row])


def test_rewards_are_added_only_where_the_truth_is_unknown(tmp_path):
    class Scorer:
        name = "lengths"

        def score(self, conversations, batch_size=32):
            return [float(len(turns[-1]["content"])) for turns in conversations]

    response = {"text": "Yes.", "finish_reason": "stop", "n_tokens": 3}
    row = {"prompt_id": "hub-1", "messages": [], "responses": [response]}
    known = [{**row, "facts": []}]
    assert with_measure(known, lambda: pytest.fail("loaded in vain"), tmp_path / "a") is known
    (scored,) = with_measure([row], Scorer, tmp_path / "b")
    assert scored["rewards"] == [4.0]
