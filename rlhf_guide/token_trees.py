"""Sequences that share beginnings, laid out so that a model reads every beginning once.

The answers to one prompt, or the comparisons of one answer with others, start alike. Here
they become one row,

    [ common beginning | rest of 1 | rest of 2 | rest of 3 | another beginning | ... ]

trees written down branch after branch: a token sees its own ancestors alone and stands at the
position it has in its sequence. Branches may fork again, and equal sequences end at one token. The
hidden states are those of the separate sequences, rounding aside, and nothing is padded.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from rlhf_guide.attention import Attention, replace_attention

ROW_TOKENS = 4096  # more would need more memory and be no faster


@dataclass(frozen=True)
class Branch:
    """The tokens [start, end) of a row, and the places of all that they can see, themselves too."""

    start: int
    end: int
    path: list[int]


@dataclass
class TreeRow:
    """Some sequences as one row of W tokens, branch after branch."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    branches: list[Branch] = field(default_factory=list)
    paths: dict[int, list[int]] = field(default_factory=dict)  # sequence → places of its tokens

    def add(self, index: int, ids: Sequence[int], path: list[int], common: int) -> list[int]:
        """Append what sequence `index` does not share; return the places of all its tokens.

        `path` has the places of the sequence before, whose first `common` tokens are the same.
        """
        start, end = len(self.tokens), len(self.tokens) + len(ids) - common
        path = [*path[:common], *range(start, end)]
        if end > start:
            self.branches.append(Branch(start, end, path))
            self.tokens += ids[common:]
            self.positions += range(common, len(ids))
        self.paths[index] = path
        return path

    def ends(self) -> dict[int, int]:
        """The place of each sequence's last token."""
        return {index: path[-1] for index, path in self.paths.items()}

    def inputs(self) -> dict[str, torch.Tensor]:
        """What a model is called with, inside `attention_along`: a batch of one row.

        The mask has four dimensions, so that transformers makes none of its own; it is not read.
        """
        return {
            "input_ids": torch.tensor([self.tokens]),
            "position_ids": torch.tensor([self.positions]),
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool),
        }


def tree_rows(sequences: Sequence[list[int]], row_tokens: int = ROW_TOKENS) -> Iterator[TreeRow]:
    """Rows in which all sequences stand, each in one of them; none may be empty.

    A row has at most `row_tokens` tokens, unless one sequence alone has more. In alphabetical order
    a sequence shares most with the one before it.
    """
    row, path, before = TreeRow(), [], []
    for index in sorted(range(len(sequences)), key=sequences.__getitem__):
        ids = sequences[index]
        common = common_length(before, ids)
        if row.tokens and len(row.tokens) + len(ids) - common > row_tokens:
            yield row
            row, path, common = TreeRow(), [], 0
        path, before = row.add(index, ids, path, common), ids
    if row.tokens:
        yield row


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """The number of tokens that both start with."""
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)


@contextmanager
def attention_along(row: TreeRow, dtype: torch.dtype) -> Iterator[None]:
    """Let the tokens of each branch see their path alone, in a model of this type."""
    seen = [
        (branch.start, branch.end, torch.tensor(branch.path), _unseen(branch, dtype))
        for branch in row.branches
    ]

    def along(usual: Attention) -> Attention:
        def attend(
            module: Any,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            _: torch.Tensor,
            **options: Any,
        ) -> tuple[torch.Tensor, None]:
            found = [
                usual(
                    module,
                    query[:, :, start:end],
                    key.index_select(2, path),
                    value.index_select(2, path),
                    unseen,
                    **options,
                )[0]
                for start, end, path, unseen in seen
            ]
            return torch.cat(found, dim=1), None

        return attend

    with replace_attention(along):
        yield


def _unseen(branch: Branch, dtype: torch.dtype) -> torch.Tensor | None:
    """−∞ where a token of a branch does not see one of its path; none if those are the same."""
    tokens, length = branch.end - branch.start, len(branch.path)
    if tokens == length:
        return None
    return torch.full((1, 1, tokens, length), -torch.inf, dtype=dtype).triu(length - tokens + 1)
