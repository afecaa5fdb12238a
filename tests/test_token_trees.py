"""Sequences as trees: a token stands where its sequence has it and sees its ancestors alone."""

from hypothesis import given
from hypothesis import strategies as st

from rlhf_guide.token_trees import as_batch, common_length, token_trees

sequences = st.lists(st.lists(st.integers(5, 8), min_size=1, max_size=9), min_size=1, max_size=12)


def test_three_answers_by_hand():
    """The question 5 6 with the answers 7 8, 7 9 and 4: 7 is read once, 9 stands behind 8."""
    (tree,) = token_trees([[5, 6, 7, 8], [5, 6, 7, 9], [5, 6, 4]])
    ids, seen, positions = as_batch([tree], pad_id=0)
    assert ids.tolist() == [[5, 6, 4, 7, 8, 9]]
    assert positions.tolist() == [[0, 1, 2, 2, 3, 3]]
    visible = [row.nonzero().flatten().tolist() for row in seen[0, 0]]
    assert visible == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 3, 4], [0, 1, 3, 5]]
    assert tree.ends == {2: 2, 0: 4, 1: 5}


@given(sequences, st.integers(4, 40), st.integers(1, 6))
def test_each_sequence_can_be_read_off_its_tree(found, row_tokens, row_sequences):
    trees = token_trees(found, row_tokens, row_sequences)
    ids, seen, positions = as_batch(trees, pad_id=0)
    assert sorted(index for tree in trees for index in tree.ends) == list(range(len(found)))
    for row, tree in enumerate(trees):
        longest = max(len(found[index]) for index in tree.ends)
        assert len(tree.tokens) <= max(row_tokens, 2 * longest)
        assert len(tree.ends) <= row_sequences
        for index, end in tree.ends.items():
            path = seen[row, 0, end].nonzero().flatten()
            assert ids[row, path].tolist() == found[index]
            assert positions[row, path].tolist() == list(range(len(found[index])))
            for depth, place in enumerate(path.tolist()):
                assert seen[row, 0, place].nonzero().flatten().equal(path[: depth + 1])


@given(sequences)
def test_a_tree_holds_each_beginning_once(found):
    """With room for all, as many tokens as there are different beginnings."""
    (tree,) = token_trees(found, row_tokens=1000, row_sequences=100)
    beginnings = {tuple(ids[:end]) for ids in found for end in range(1, len(ids) + 1)}
    assert len(tree.tokens) == len(beginnings)


def test_a_prompt_that_does_not_fit_starts_a_row_of_its_own():
    """Cutting it would read its question twice."""
    first = [[1, *range(10, 40), answer] for answer in (2, 3)]
    second = [[1, *range(50, 80), answer] for answer in (2, 3)]
    trees = token_trees([*first, *second], row_tokens=60)
    assert [sorted(tree.ends) for tree in trees] == [[0, 1], [2, 3]]


def test_common_length():
    assert common_length([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_length([1, 2], [1, 2, 3]) == 2
    assert common_length([], [1]) == 0
