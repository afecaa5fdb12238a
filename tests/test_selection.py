"""Preference pairs from rewarded samples: strategies, ties, penalty, orientation, cut answers."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_guide.errors import DataError, ParameterError
from rlhf_guide.profiles import load_profile
from rlhf_guide.selection import STRATEGIES, build_judged_pairs, build_pairs, penalised_rewards


def record(texts, rewards, prompt_id="p1", cut=()):
    return {
        "prompt_id": prompt_id,
        "source": "test",
        "section": "chat",
        "messages": [{"role": "user", "content": "Q"}],
        "responses": [
            {"text": text, "finish_reason": "length" if i in cut else "stop", "n_tokens": 1}
            for i, text in enumerate(texts)
        ],
        "rewards": list(rewards),
        "model": "m",
        "reward_model": "rm",
    }


def answers(pair):
    return pair["chosen"][-1]["content"], pair["rejected"][-1]["content"]


def only_pair(*args, **options):
    pairs, _ = build_pairs([record(*args)], **options)
    return pairs[0]


def test_best_worst_takes_the_extremes():
    pair = only_pair(["a", "b", "c"], [0.1, 2.0, -1.0])
    assert answers(pair) == ("b", "c")
    assert (pair["chosen_reward"], pair["rejected_reward"], pair["margin"]) == (2.0, -1.0, 3.0)


def test_best_second_takes_the_two_highest():
    assert answers(only_pair(["a", "b", "c"], [0.1, 2.0, -1.0], strategy="best_second")) == (
        "b",
        "a",
    )


def test_best_random_keeps_the_best_and_reaches_every_other_answer():
    rows = [record(["a", "b", "c", "d"], [0, 3, 1, 2], f"p{i}") for i in range(300)]
    pairs, _ = build_pairs(rows, "best_random", seed=1)
    assert {answers(pair)[0] for pair in pairs} == {"b"}
    counts = Counter(answers(pair)[1] for pair in pairs)
    assert set(counts) == {"a", "c", "d"}
    assert min(counts.values()) > 70  # 100 expected of each


def test_random_is_random_and_not_the_first_two():
    rows = [record(["a", "b", "c", "d"], [0, 3, 1, 2], f"p{i}") for i in range(600)]
    pairs, _ = build_pairs(rows, "random", seed=1)
    counts = Counter(frozenset(answers(pair)) for pair in pairs)
    assert len(counts) == 6
    assert min(counts.values()) > 65  # 100 expected of each
    assert all(pair["chosen_reward"] > pair["rejected_reward"] for pair in pairs)


@pytest.mark.parametrize("strategy", ["random", "best_random"])
def test_draws_depend_on_seed_and_prompt_but_not_on_row_order(strategy):
    rows = [record(list("abcdefgh"), range(8), f"p{i}") for i in range(40)]
    first = {p["prompt_id"]: answers(p) for p in build_pairs(rows, strategy, seed=5)[0]}
    again = {p["prompt_id"]: answers(p) for p in build_pairs(rows[::-1], strategy, seed=5)[0]}
    other = {p["prompt_id"]: answers(p) for p in build_pairs(rows, strategy, seed=6)[0]}
    later = build_pairs(rows, strategy, seed=5, iteration=2)[0]
    assert first == again
    assert first != other
    assert first != {p["prompt_id"]: answers(p) for p in later}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_identical_texts_and_ties_are_dropped_and_counted(strategy):
    rows = [
        record(["same", " same\n"], [1.0, 0.0], "p1"),
        record(["a", "b"], [1.0, 1.0], "p2"),
        record(["a", "b"], [1.0, 0.0], "p3"),
        record(["alone"], [1.0], "p4"),
        record(["", "b"], [1.0, 0.0], "p5"),
    ]
    pairs, counts = build_pairs(rows, strategy)
    assert [pair["prompt_id"] for pair in pairs] == ["p3"]
    assert counts["prompts"] == 5
    assert counts["pairs"] == 1
    for reason in ("identical", "tie", "too_few", "empty"):
        assert counts[f"dropped_{reason}"] == 1


def test_batch_noise_does_not_make_a_text_beat_itself():
    # The same text scored in two batches may differ in the last digit.
    pair = only_pair(["x", "x", "y"], [1.0, 1.0000001, 0.5], strategy="best_second")
    assert answers(pair) == ("x", "y")


def test_penalty_is_used_in_choice_and_in_orientation():
    long, short = "l" * 1000, "s" * 10
    rewards = [1.0, 0.5]
    plain = only_pair([long, short], rewards)
    assert answers(plain) == (long, short)
    pair = only_pair([long, short], rewards, length_penalty=0.001)
    assert answers(pair) == (short, long)  # the raw order would put the long answer first again
    assert pair["chosen_reward"] < pair["rejected_reward"]
    assert pair["chosen_score"] > pair["rejected_score"]
    assert pair["margin"] == pytest.approx((0.5 - 0.01) - (1.0 - 1.0))


def test_penalised_rewards_are_per_character():
    """Eq. 9 with λ = 0.001."""
    found = penalised_rewards([1.0, 1.0], ["", "é" * 500], 0.001)
    assert found == pytest.approx([1.0, 0.5])


@given(
    st.lists(
        st.tuples(st.text(max_size=30), st.floats(-5, 5, allow_nan=False)), min_size=2, max_size=8
    ),
    st.sampled_from(sorted(STRATEGIES)),
)
def test_zero_penalty_is_the_identity(samples, strategy):
    row = record([text for text, _ in samples], [reward for _, reward in samples])
    without = build_pairs([row], strategy, seed=1)
    assert build_pairs([row], strategy, length_penalty=0.0, seed=1) == without
    for pair in without[0]:
        assert pair["chosen_score"] == pair["chosen_reward"] > pair["rejected_reward"]
        assert pair["chosen"][:-1] == pair["rejected"][:-1]


def test_cut_answers_are_marked_unfinished():
    pairs, counts = build_pairs([record(["best", "mid", "worst"], [2, 1, 0], "p1", {0})])
    assert (pairs[0]["chosen_finished"], pairs[0]["rejected_finished"]) == (False, True)
    assert (counts["chosen_cut"], counts["rejected_cut"]) == (1, 0)


def test_pairs_keep_the_prompts_extra_fields_and_leave_the_samples_behind():
    pair = only_pair(["a", "b"], [1, 0], iteration=3)
    assert pair["section"] == "chat"
    assert pair["iteration"] == 3
    assert "responses" not in pair
    assert "rewards" not in pair


def test_counts_hold_margins_and_lengths():
    _, counts = build_pairs([record(["aaaa", "b"], [1.0, 0.5])])
    assert counts["margin"] == 0.5
    assert (counts["chosen_characters"], counts["rejected_characters"]) == (4, 1)
    assert "margin" not in build_pairs([])[1]


def test_bad_input_is_refused_with_the_prompt():
    with pytest.raises(ParameterError, match="best_worst"):
        build_pairs([], "max_min")
    broken = record(["a", "b"], [1.0, 0.0], "p9")
    with pytest.raises(DataError, match="'p9' has 2 answers but 1 rewards"):
        build_pairs([{**broken, "rewards": [1.0]}])
    with pytest.raises(DataError, match=r"'p9'.*NaN"):
        build_pairs([{**broken, "rewards": [1.0, np.nan]}])


# --- ranked by a pairwise judge ----------------------------------------------------------------


def judge_of(values, asked):
    """A Bradley-Terry judge with a hidden value for each text, which notes what it is asked."""

    def probability(comparisons):
        asked.extend((a, b) for _, a, b in comparisons)
        gaps = np.array([values[a] - values[b] for _, a, b in comparisons])
        return 1 / (1 + np.exp(-gaps))

    return probability


@given(st.permutations(range(7)))
def test_a_judge_s_best_and_worst_are_found_with_few_questions(order):
    values = {f"answer {i}": float(i) for i in range(7)}
    row = record([f"answer {i}" for i in order], np.zeros(7))  # rewards say nothing
    asked = []
    pairs, counts = build_judged_pairs([row], judge_of(values, asked), iteration=2)
    assert answers(pairs[0]) == ("answer 6", "answer 0")
    assert len(asked) == 6 + 5 + 1
    chance = 1 / (1 + np.exp(-6.0))
    assert pairs[0]["chosen_score"] == pytest.approx(chance)
    assert pairs[0]["margin"] == counts["margin"] == pytest.approx(2 * chance - 1)
    assert (pairs[0]["chosen_reward"], pairs[0]["iteration"]) == (0.0, 2)


def test_what_a_judge_cannot_order_is_dropped_and_counted():
    beats = {("a", "b"), ("b", "c"), ("c", "a")}  # rock, paper, scissors

    def circular(comparisons):
        return np.array([0.9 if (a, b) in beats else 0.1 for _, a, b in comparisons])

    rows = [
        record(["same", " same\n"], [1.0, 0.0], "p1"),
        record(["alone"], [1.0], "p2"),
        record(["a", "b", "c"], [2.0, 1.0, 0.0], "p3"),
    ]
    pairs, counts = build_judged_pairs(rows, circular)
    assert (pairs, counts["prompts"]) == ([], 3)
    for reason in ("identical", "too_few", "tie"):
        assert counts[f"dropped_{reason}"] == 1
    blank = judge_of({"": 1.0, "b": 0.0}, [])
    assert build_judged_pairs([record(["", "b"], [0, 1])], blank)[1]["dropped_empty"] == 1


def test_a_judge_knows_no_length_penalty_and_no_other_strategy():
    for other in ({"online_length_penalty": 0.001}, {"online_pair_strategy": "random"}):
        with pytest.raises(ParameterError, match="compares answers and gives no rewards"):
            load_profile("smoke", online_rank_by="preference_model", **other)
    assert load_profile("smoke", online_rank_by="preference_model").online.rank_by
