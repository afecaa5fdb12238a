"""Rewards stay with their responses, survive a kill and never mix two models."""

import numpy as np
import pytest

from rlhf_guide.annotation import annotate, annotation_summary
from rlhf_guide.errors import DataError
from rlhf_guide.files import append_jsonl, read_jsonl


class LengthScorer:
    """Rewards the length of the answer and remembers what it was asked."""

    name = "length"

    def __init__(self, fail_after: int | None = None):
        self.seen, self.fail_after = [], fail_after

    def score(self, conversations, batch_size=32):
        if self.fail_after is not None and len(self.seen) >= self.fail_after:
            raise KeyboardInterrupt
        texts = [messages[-1]["content"] for messages in conversations]
        self.seen += texts
        return np.array([len(text) for text in texts], dtype=np.float32)


def generation(number: int, *texts: str) -> dict:
    return {
        "prompt_id": f"p{number}",
        "messages": [{"role": "user", "content": f"Question {number}"}],
        "source": "test",
        "model": "policy",
        "facts": [["kept"]],
        "responses": [
            {"text": text, "finish_reason": "stop", "temperature": 1.0, "n_tokens": 1, "seed": 0}
            for text in texts
        ],
    }


GENERATIONS = [generation(i, "a" * i, "b" * (3 * i), "") for i in range(80)]


def test_rewards_are_aligned_with_responses(tmp_path):
    rows = annotate(GENERATIONS, LengthScorer(), tmp_path / "rewards.jsonl")
    assert [row["prompt_id"] for row in rows] == [row["prompt_id"] for row in GENERATIONS]
    for row in rows:
        assert row["rewards"] == [len(response["text"]) for response in row["responses"]]
        assert row["reward_model"] == "length"
        assert row["facts"] == [["kept"]]
    assert read_jsonl(tmp_path / "rewards.jsonl") == rows


def test_prompts_with_unequal_numbers_of_responses_are_kept(tmp_path):
    rows = annotate([generation(1, "x"), generation(2, "x", "yy")], LengthScorer(), tmp_path / "r")
    assert [row["rewards"] for row in rows] == [[1.0], [1.0, 2.0]]


def test_a_killed_run_continues_where_it_stopped(tmp_path):
    path = tmp_path / "rewards.jsonl"
    with pytest.raises(KeyboardInterrupt):
        annotate(GENERATIONS, LengthScorer(fail_after=60), path)
    finished = len(read_jsonl(path))
    assert 0 < finished < len(GENERATIONS)
    with open(path, "a") as file:
        file.write('{"prompt_id": "p79", "rewa')  # the line that the kill cut short
    second = LengthScorer()
    rows = annotate(GENERATIONS, second, path)
    assert len(second.seen) == 3 * (len(GENERATIONS) - finished)
    assert rows == annotate(GENERATIONS, LengthScorer(), tmp_path / "whole.jsonl")


def test_a_finished_file_is_not_scored_again(tmp_path):
    first = annotate(GENERATIONS, LengthScorer(), tmp_path / "r.jsonl")
    assert annotate(GENERATIONS, LengthScorer(fail_after=0), tmp_path / "r.jsonl") == first


def test_rewards_of_another_model_or_answer_are_not_kept(tmp_path):
    path = tmp_path / "r.jsonl"
    old = annotate(GENERATIONS[:3], LengthScorer(), path, reward_model="old")
    assert {row["reward_model"] for row in old} == {"old"}
    changed = [generation(0, "new text"), *GENERATIONS[1:3]]
    rows = annotate(changed, LengthScorer(), path)
    assert {row["reward_model"] for row in read_jsonl(path)} == {"length"}
    assert rows[0]["rewards"] == [8.0]
    again = annotate([generation(0, "newer text"), *changed[1:]], LengthScorer(), path)
    assert again[0]["rewards"] == [10.0]


def test_rows_of_prompts_no_longer_asked_are_dropped(tmp_path):
    path = tmp_path / "r.jsonl"
    append_jsonl(path, [{**generation(99, "x"), "rewards": [1.0], "reward_model": "length"}])
    annotate(GENERATIONS[:2], LengthScorer(), path)
    assert [row["prompt_id"] for row in read_jsonl(path)] == ["p0", "p1"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_is_an_error(tmp_path, bad):
    class Broken:
        name = "broken"

        def score(self, conversations, batch_size=32):
            return np.array([1.0, bad], dtype=np.float32)

    with pytest.raises(DataError, match=r"response 1 to prompt 'p7'"):
        annotate([generation(7, "a", "b")], Broken(), tmp_path / "r.jsonl")
    assert read_jsonl(tmp_path / "r.jsonl") == []


def test_bad_generations_are_refused(tmp_path):
    with pytest.raises(DataError, match="given twice"):
        annotate([generation(1, "a"), generation(1, "b")], LengthScorer(), tmp_path / "r.jsonl")
    with pytest.raises(DataError, match="no responses"):
        annotate([generation(1)], LengthScorer(), tmp_path / "r.jsonl")


def test_summary_equals_hand_values(tmp_path):
    rows = annotate(
        [generation(1, "aa", " "), generation(2, "bbbb")], LengthScorer(), tmp_path / "r"
    )
    assert annotation_summary(rows) == {
        "prompts": 2,
        "responses": 3,
        "empty_responses": 1,
        "mean_reward": pytest.approx(7 / 3),
        "mean_best_reward": 3.0,
    }
