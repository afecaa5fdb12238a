"""Sequences as trees: a token stands where its sequence has it and sees its ancestors alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_guide.attention import ALL_ATTENTION_FUNCTIONS
from rlhf_guide.models import load_policy, resolve_model
from rlhf_guide.token_trees import attention_along, common_length, tree_rows

sequences = st.lists(st.lists(st.integers(5, 8), min_size=1, max_size=9), min_size=1, max_size=12)


def test_three_answers_by_hand():
    """The question 5 6 with the answers 7 8, 7 9 and 4: 7 is read once, 9 stands behind 8."""
    (row,) = tree_rows([[5, 6, 7, 8], [5, 6, 7, 9], [5, 6, 4]])
    assert row.tokens == [5, 6, 4, 7, 8, 9]
    assert row.positions == [0, 1, 2, 2, 3, 3]
    assert [branch.path for branch in row.branches] == [[0, 1, 2], [0, 1, 3, 4], [0, 1, 3, 5]]
    assert [(branch.start, branch.end) for branch in row.branches] == [(0, 3), (3, 5), (5, 6)]
    assert row.ends() == {2: 2, 0: 4, 1: 5}
    assert row.paths[1] == [0, 1, 3, 5]


@given(sequences, st.integers(1, 40))
def test_each_sequence_can_be_read_off_its_row(found, row_tokens):
    rows = list(tree_rows(found, row_tokens))
    assert sorted(index for row in rows for index in row.paths) == list(range(len(found)))
    for row in rows:
        longest = max(len(found[index]) for index in row.paths)
        assert len(row.tokens) <= max(row_tokens, longest)
        ancestors = {path[-1]: path for path in paths_of(row)}
        for index, path in row.paths.items():
            assert ancestors[path[-1]] == path
            assert [row.tokens[place] for place in path] == found[index]
            assert [row.positions[place] for place in path] == list(range(len(found[index])))


def paths_of(row):
    """The places of each token and its ancestors; every token belongs to one branch."""
    for branch in row.branches:
        before = len(branch.path) - (branch.end - branch.start)
        assert branch.path[before:] == list(range(branch.start, branch.end))
        for place in range(before, len(branch.path)):
            yield branch.path[: place + 1]


@given(sequences)
def test_a_row_holds_each_beginning_once(found):
    """With room for all, as many tokens as there are different beginnings."""
    (row,) = tree_rows(found, row_tokens=1000)
    beginnings = {tuple(ids[:end]) for ids in found for end in range(1, len(ids) + 1)}
    assert len(row.tokens) == len(list(paths_of(row))) == len(beginnings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_depends_on_its_ancestors_alone(dtype):
    """Every hidden state is that of the sequence read by itself, rounding aside."""
    model = load_policy(resolve_model("random-tiny-llama"), dtype)
    found = [[5, 6, 7, 8], [5, 6, 7, 9, 10], [5, 6, 4], [11, 12], [5, 6], [11, 12, 5]]
    (row,) = tree_rows(found)
    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with torch.no_grad(), attention_along(row, dtype):
        hidden = model.base_model(**row.inputs()).last_hidden_state[0]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is usual
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    for index, end in row.ends().items():
        with torch.no_grad():
            alone = model.base_model(input_ids=torch.tensor([found[index]])).last_hidden_state
        torch.testing.assert_close(hidden[end], alone[0, -1], atol=tolerance, rtol=tolerance)


def test_common_length():
    assert common_length([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_length([1, 2], [1, 2, 3]) == 2
    assert common_length([], [1]) == 0
