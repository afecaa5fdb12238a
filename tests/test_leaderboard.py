"""Tables of results: several judges of one comparison, Table 4's layout, the paper's numbers."""

import numpy as np
import pytest

from rlhf_guide.errors import DataError
from rlhf_guide.evaluation import bootstrap_mean, win_rate
from rlhf_guide.judges import AnswerPair, preferences_from_scores
from rlhf_guide.leaderboard import (
    agreement,
    as_frame,
    as_markdown,
    judge_rows,
    paper_ablation,
    paper_results,
    policy_rows,
)

CONTEXT = [{"role": "user", "content": "?"}]


def pairs_of(lengths, baseline_lengths):
    return [
        AnswerPair(f"p{i}", 0, CONTEXT, "a" * own, "b" * other)
        for i, (own, other) in enumerate(zip(lengths, baseline_lengths, strict=True))
    ]


def world(count=400, seed=0):
    """Utilities of two equally good policies, the first one longer, and a judge of length."""
    rng = np.random.default_rng(seed)
    own, other = rng.integers(40, 120, count), rng.integers(20, 100, count)
    utility, baseline = rng.normal(size=(2, count))
    return pairs_of(own, other), (utility, baseline), (own, other)


def test_a_judge_of_length_is_unmasked_at_equal_length():
    pairs, truth, lengths = world()
    judges = {"truth": preferences_from_scores(*truth), "length": preferences_from_scores(*lengths)}
    by_truth, by_length = judge_rows(judges, pairs, n_boot=200)
    assert by_truth["win rate"]["value"] == pytest.approx(0.5, abs=0.05)
    assert by_length["win rate"]["value"] > 0.7
    equal = by_length["at equal length"]
    assert abs(equal["value"] - 0.5) < 0.1 < by_length["win rate"]["value"] - 0.5
    assert by_truth["characters"] - by_truth["baseline characters"] == pytest.approx(20, abs=5)


def test_raw_win_rate_is_that_of_evaluation():
    pairs, truth, _ = world(60)
    (row,) = judge_rows({"truth": preferences_from_scores(*truth)}, pairs, n_boot=100, seed=3)
    other = win_rate(*truth, [pair.prompt_id for pair in pairs], n_boot=100, seed=3)
    assert row["win rate"] == {key: other[key] for key in ("value", "low", "high", "n")}
    assert row["ties"] == other["ties"]


def test_comparisons_without_a_verdict_are_left_out_and_counted():
    pairs = pairs_of([3, 4, 5], [5, 5, 5])
    (row,) = judge_rows({"model": [1.0, None, 0.5]}, pairs, n_boot=50)
    assert (row["answers"], row["ties"], row["win rate"]["value"]) == (2, 0.5, 0.75)
    assert row["characters"] == 4.0
    with pytest.raises(DataError, match="model: none of 3 comparisons"):
        judge_rows({"model": [None] * 3}, pairs)
    with pytest.raises(DataError, match="model: 2 preferences for 3"):
        judge_rows({"model": [1.0, 0.0]}, pairs)


def test_equal_lengths_leave_nothing_to_control():
    (row,) = judge_rows({"model": [1.0, 0.0]}, pairs_of([4, 4], [4, 4]), n_boot=50)
    assert row["at equal length"] is None


def test_agreement_counts_equal_verdicts_of_common_comparisons():
    judges = {"a": [1.0, 0.0, 0.5, 1.0], "b": [0.9, 0.7, None, 0.6], "c": [None] * 3 + [0.2]}
    found = agreement(judges)
    assert found.loc["a", "a"] == found.loc["b", "b"] == 1.0
    assert found.loc["a", "b"] == found.loc["b", "a"] == pytest.approx(2 / 3)
    assert found.loc["b", "c"] == 0.0
    assert list(found.index) == list(found.columns) == ["a", "b", "c"]
    assert np.isnan(agreement({"a": [1.0, None], "b": [None, 1.0]}).loc["a", "b"])


def metrics(quantity="utility"):
    found = {f"{quantity}_{name}": bootstrap_mean([1.0]) for name in ("sft", "offline_dpo")}
    found |= {f"{quantity}_online_dpo": bootstrap_mean([2.0, 3.0])}
    found |= {"win_rate_online_over_sft": bootstrap_mean([0.75])}
    found |= {"lc_win_rate_online_over_sft": bootstrap_mean([0.25])}
    found |= {f"task_course_facts_{name}": bootstrap_mean([0.5]) for name in ("sft", "online_dpo")}
    return found | {"tokens_sft": bootstrap_mean([30.0]), "seconds": 3.0}


def test_policies_stand_in_the_layout_of_table_4():
    sft, offline, online = policy_rows(metrics())
    names = ["policy", "true utility", "win rate", "at equal length", "tokens", "format kept"]
    assert list(sft) == [*names, "course_facts"]
    assert online["true utility"]["value"] == 2.5
    assert online["win rate"]["value"] == 0.75
    assert online["at equal length"]["value"] == 0.25
    assert (sft["win rate"], offline["course_facts"]) == (None, None)


def test_on_real_data_the_measure_is_the_reward():
    assert "reward" in policy_rows(metrics("reward"))[0]
    with pytest.raises(DataError, match="hold no policy"):
        policy_rows({})


def test_report_writes_what_was_measured_and_the_papers_numbers_apart():
    text = as_markdown(metrics())
    mine, tables_2_and_3, table_4 = text.split("**The paper")
    assert "| online_dpo | 2.50 [2.00, 3.00] | 0.75 [0.75, 0.75] |" in mine
    assert "| iterative DPO | 31.3 | 8.46 | 29.1 | 80.7 |" in tables_2_and_3
    assert "| Ours-concise | 0.001 | 38.1 | 22.1 | 382 |" in table_4
    frame = as_frame(policy_rows(metrics()))
    assert frame.loc["sft", "tokens"] == "30.00 [30.00, 30.00]"
    assert frame.loc["sft", "win rate"] == ""


def test_the_papers_numbers_are_whole():
    main, ablation = paper_results(), paper_ablation()
    assert main.shape == (3, 9)
    assert ablation.shape == (3, 10)
    assert main.loc["iterative DPO", "LC AlpacaEval 2"] == 31.3
    # The paper prints two TruthfulQA scores for one model; everything else agrees.
    common = [name for name in main if name in ablation and name != "TruthfulQA"]
    assert (main.loc["iterative DPO", common] == ablation.loc["Ours", common]).all()
    assert main.loc["iterative DPO", "TruthfulQA"] != ablation.loc["Ours", "TruthfulQA"]
