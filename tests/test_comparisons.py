"""Round robin, circles and markers; no model is loaded."""

import numpy as np
import pytest

from rlhf_guide.comparisons import has_marker, intransitive_triples, round_robin


def judge_of_length(comparisons):
    return np.array([1 / (1 + np.exp(len(b) - len(a))) for _, a, b in comparisons])


def judge_in_a_circle(comparisons):
    wins = {("a", "b"), ("b", "c"), ("c", "a"), ("a", "d"), ("b", "d"), ("c", "d")}
    return np.array([float((first, second) in wins) for _, first, second in comparisons])


def test_round_robin_asks_every_pair_once_and_is_complementary():
    asked = []

    def counting(comparisons):
        asked.extend(comparisons)
        return judge_of_length(comparisons)

    chances = round_robin(counting, [], ["xx", "x", "xxxx", "xxx"])
    assert len(asked) == 6
    np.testing.assert_allclose(chances + chances.T, 1)
    assert np.argsort(-chances.mean(axis=1)).tolist() == [2, 3, 0, 1]


def test_round_robin_of_few_answers():
    assert round_robin(judge_of_length, [], ["x"]).tolist() == [[0.5]]
    with pytest.raises(ValueError, match="at least one"):
        round_robin(judge_of_length, [], [])


@pytest.mark.parametrize("draw", ["abcd", "dcba", "bdac"])
def test_only_the_circle_is_counted_whatever_the_order(draw):
    assert intransitive_triples(round_robin(judge_in_a_circle, [], draw)) == (1, 4)


def test_numbers_and_ties_make_no_circle():
    assert intransitive_triples(round_robin(judge_of_length, [], ["x", "xx", "xxx"])) == (0, 1)
    assert intransitive_triples(np.full((3, 3), 0.5)) == (0, 1)


@pytest.mark.parametrize("place", ["question", "chosen", "rejected", None])
def test_a_marker_is_found_wherever_it_stands(place):
    text = {name: name for name in ("question", "chosen", "rejected")}
    if place:
        text[place] += " [RESPONSE B]"
    prompt = [{"role": "user", "content": text["question"]}]
    pair = {
        side: [*prompt, {"role": "assistant", "content": text[side]}]
        for side in ("chosen", "rejected")
    }
    assert has_marker(pair) == (place is not None)
