"""Sequences that share beginnings, laid out so that a model reads every beginning once.

The answers to one prompt, or the comparisons of one answer with others, start alike. Here
they become one row,

    [ common beginning | rest of 1 | rest of 2 | rest of 3 ]

a tree written down branch after branch: a token sees its own ancestors alone and stands at the
position it has in its sequence. Branches may fork again, and equal sequences end at one token. The
hidden states are those of the separate sequences, rounding aside.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

ROW_TOKENS = 256  # attention looks at the whole row; longer ones cost more than they share


@dataclass
class Tree:
    """Some sequences as one row of W tokens, branch after branch."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    branches: list[tuple[int, int, int]] = field(default_factory=list)  # parent, start, end
    ends: dict[int, int] = field(default_factory=dict)  # sequence → place of its last token

    def add(self, index: int, ids: Sequence[int], path: list[int], common: int) -> list[int]:
        """Append what sequence `index` does not share; return the places of all its tokens.

        `path` has the places of the sequence before, whose first `common` tokens are the same.
        """
        start, new = len(self.tokens), len(ids) - common
        if new:
            parent = path[common - 1] if common else -1
            self.branches.append((parent, start, start + new))
            self.tokens += ids[common:]
            self.positions += range(common, len(ids))
        path = path[:common] + list(range(start, start + new))
        self.ends[index] = path[-1]
        return path

    def mask(self, width: int) -> torch.Tensor:
        """Which token sees which, booleans (width, width); padding sees itself."""
        seen = torch.eye(width, dtype=torch.bool)
        for parent, start, end in self.branches:
            if parent >= 0:
                seen[start:end, :start] = seen[parent, :start]
            seen[start:end, start:end] = torch.ones(end - start, end - start).tril().bool()
        return seen


def token_trees(
    sequences: Sequence[list[int]], row_tokens: int = ROW_TOKENS, row_sequences: int = 32
) -> list[Tree]:
    """Trees in which all sequences stand, each in one of them; none may be empty.

    A tree is a row of at most `row_tokens` tokens, or twice those of a longer sequence in it, and
    of at most `row_sequences` sequences. In alphabetical order a sequence shares most with the one
    before it. What does not fit is cut where least is read twice: a branch that would fit into a
    row of its own gets one.
    """
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    ordered = [sequences[index] for index in order]
    shared = [0, *map(common_length, ordered, ordered[1:])]
    trees, path = [Tree()], []
    for at, index in enumerate(order):
        tree, limit = trees[-1], max(row_tokens, 2 * len(ordered[at]))
        room = limit - len(tree.tokens)
        alone = len(ordered[at]) - shared[at]
        branch = _branch_tokens(ordered, shared, at)
        parted = branch > room and shared[at] + branch <= limit
        if tree.tokens and (parted or alone > room or len(tree.ends) == row_sequences):
            trees.append(tree := Tree())
        path = tree.add(index, ordered[at], path, shared[at] if tree.tokens else 0)
    return trees


def _branch_tokens(ordered: Sequence[list[int]], shared: Sequence[int], at: int) -> int:
    """Tokens that a sequence and those after it have beyond what it shares with the one before."""
    tokens, after = len(ordered[at]) - shared[at], at + 1
    while after < len(ordered) and shared[after] > shared[at]:
        tokens += len(ordered[after]) - shared[after]
        after += 1
    return tokens


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """The number of tokens that both start with."""
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)


def as_batch(trees: Sequence[Tree], pad_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids (R, W), which token sees which (R, 1, W, W) and positions (R, W) of R trees."""
    width = max(len(tree.tokens) for tree in trees)
    ids = torch.full((len(trees), width), pad_id)
    positions = torch.zeros(len(trees), width, dtype=torch.long)
    for row, tree in enumerate(trees):
        ids[row, : len(tree.tokens)] = torch.tensor(tree.tokens)
        positions[row, : len(tree.tokens)] = torch.tensor(tree.positions)
    return ids, torch.stack([tree.mask(width) for tree in trees])[:, None], positions
