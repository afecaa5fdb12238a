"""Packing plans: which conversation goes into which block, and how full the blocks get.

Training packs with TRL (see `sft`). The plans here need lengths only, so they show what the
strategies differ in, and count a corpus' blocks (and so its optimiser steps) before anything is
packed. A plan is an array: the number of each conversation's block.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from rlhf_guide.errors import DataError

MEDIAN, SPREAD, SHORTEST = 64, 1.2, 8  # the long-tailed mix: tokens, sigma of the log, tokens


def long_tailed_lengths(count: int, block: int, seed: int = 0) -> np.ndarray:
    """Conversation lengths in tokens, log-normal like chat data: many short, a few very long.

    exp(N(ln 64, 1.2²)), rounded down and clipped to [8, block]. This is the mix that
    tests/benchmarks/packing.py measures on.
    """
    drawn = np.random.default_rng(seed).lognormal(np.log(MEDIAN), SPREAD, count)
    return np.clip(drawn, SHORTEST, block).astype(np.int64)


def fill(plan: np.ndarray, lengths: Sequence[int], block: int) -> float:
    """Share of the blocks' room that holds tokens, between 0 and 1."""
    return float(np.sum(lengths) / ((np.max(plan) + 1) * block))


def first_fit(lengths: Sequence[int], block: int) -> np.ndarray:
    """Each conversation, in the order given, into the first block that has room for it.

    Sort the lengths in decreasing order first and it is first-fit-decreasing. One pass over all
    blocks a conversation: for thousands, not millions. Raises DataError for a length that fits
    into no block.
    """
    lengths = _checked(lengths, block)
    room = np.full(len(lengths), block)
    plan = np.empty(len(lengths), dtype=np.int64)
    for place, length in enumerate(lengths):
        plan[place] = np.argmax(room >= length)
        room[plan[place]] -= length
    return plan


def best_fit_decreasing(lengths: Sequence[int], block: int) -> np.ndarray:
    """Longest first, each into the fullest block that still has room: TRL's `"bfd"`.

    Conversations of one length and blocks with one room are interchangeable, so whole groups are
    placed at once: a million conversations take seconds. Raises DataError for a length that fits
    into no block.
    """
    lengths = _checked(lengths, block)
    plan = np.empty(len(lengths), dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    cuts = np.flatnonzero(np.diff(lengths[order])) + 1
    rooms = _Rooms(block)
    for members in np.split(order, cuts):
        plan[members] = rooms.place(int(lengths[members[0]]), len(members))
    return plan


class _Rooms:
    """The blocks begun so far, grouped by the room that is left in them."""

    def __init__(self, block: int) -> None:
        self.block = block
        self.count = 0
        self.sizes: list[int] = []  # the rooms that some block has, sorted
        self.blocks: dict[int, np.ndarray] = {}

    def place(self, length: int, count: int) -> np.ndarray:
        """Blocks of `count` conversations of one length, the tightest room used first."""
        placed, left = [], []
        while count:
            room, blocks = self._tightest(length, count)
            each = room // length
            into = np.repeat(blocks, each)[:count]
            used = -(-len(into) // each)
            last = len(into) - (used - 1) * each
            left.append((room - each * length, blocks[: used - 1]))
            left.append((room - last * length, blocks[used - 1 : used]))
            left.append((room, blocks[used:]))
            placed.append(into)
            count -= len(into)
        for room, blocks in left:
            self._return(room, blocks)
        return np.concatenate(placed)

    def _tightest(self, length: int, count: int) -> tuple[int, np.ndarray]:
        """The smallest room of at least `length` and its blocks; new blocks where none has it."""
        place = bisect_left(self.sizes, length)
        if place < len(self.sizes):
            room = self.sizes.pop(place)
            return room, self.blocks.pop(room)
        opened = self.count + np.arange(-(-count // (self.block // length)))
        self.count += len(opened)
        return self.block, opened

    def _return(self, room: int, blocks: np.ndarray) -> None:
        if room == 0 or len(blocks) == 0:
            return
        if room not in self.blocks:
            insort(self.sizes, room)
            self.blocks[room] = blocks
        else:
            self.blocks[room] = np.concatenate([self.blocks[room], blocks])


def _checked(lengths: Sequence[int], block: int) -> np.ndarray:
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.size == 0:
        raise DataError("there is nothing to pack: no conversation is left.")
    if lengths.min() < 1 or lengths.max() > block:
        raise DataError(
            f"lengths run from {lengths.min()} to {lengths.max()} tokens, but a block takes 1 to "
            f"{block}: drop the others first, or raise sft_max_length."
        )
    return lengths
