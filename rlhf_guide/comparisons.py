"""Pairwise comparisons as text, and what follows from any judge's probabilities.

The layout and the order of the two answers, the position bias, and the knock-out that finds the
best of n answers with n − 1 comparisons. No model is loaded here: every function takes plain text,
numbers or a function that judges.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np

Messages = list[dict[str, str]]
Comparison = tuple[Messages, str, str]  # (context messages, answer a, answer b)
Judge = Callable[[Sequence[Comparison]], np.ndarray]  # P(a ≻ b) of each comparison

MARKERS = ("[CONTEXT]", "[RESPONSE A]", "[RESPONSE B]")


def format_comparison(context_messages: Messages, a: str, b: str) -> str:
    """The user message that shows a context and two answers, in the layout of the paper.

    The white space is that of RLHFlow's published preference models as their template renders it,
    so their weights can be used with this function. A marker that occurs inside a text would move
    the border between the answers; it is defused to, for example, "(RESPONSE B)".
    """
    turns = "".join(
        f"\n<turn> {'assistant' if index % 2 else 'user'}\n {_defused(turn['content'])}"
        for index, turn in enumerate(context_messages)
    )
    return f"[CONTEXT] \n{turns}\n [RESPONSE A] {_defused(a)} [RESPONSE B] {_defused(b)} \n"


def _defused(text: str) -> str:
    for marker in MARKERS:
        text = text.replace(marker, f"({marker[1:-1]})")
    return text


def chosen_is_first(prompt_id: str, pair_index: int, seed: int) -> bool:
    """Whether the better answer of a pair stands in place A: a fair coin fixed by its arguments.

    The coin is a hash, not the next number of a shared generator: workers that start from copies
    of one generator would all draw the same sequence.
    """
    digest = hashlib.sha256(f"{seed}/{prompt_id}/{pair_index}".encode()).digest()
    return digest[0] % 2 == 0


def has_marker(pair: dict[str, Any]) -> bool:
    """Whether a pair's context or answers contain a marker, which `format_comparison` defuses."""
    turns = [*pair["chosen"], pair["rejected"][-1]]
    return any(marker in turn["content"] for turn in turns for marker in MARKERS)


def labelled_comparisons(
    pairs: Sequence[dict[str, Any]], seed: int, both_orders: bool = False
) -> Iterator[tuple[str, str]]:
    """Text and label ("A" or "B") of every preference pair, about half of them "A".

    A pair's index counts the pairs of its own prompt, so neither the other prompts of the list nor
    the number of workers that split it by prompt changes its order. With `both_orders` the same
    pair follows with its answers exchanged and the other label.
    """
    seen: Counter[str] = Counter()
    for pair in pairs:
        prompt_id = pair["prompt_id"]
        first = chosen_is_first(prompt_id, seen[prompt_id], seed)
        seen[prompt_id] += 1
        context, chosen, rejected = as_comparison(pair)
        for chosen_first in (first, not first) if both_orders else (first,):
            answers = (chosen, rejected) if chosen_first else (rejected, chosen)
            yield format_comparison(context, *answers), "A" if chosen_first else "B"


def as_comparison(pair: dict[str, Any]) -> Comparison:
    """A preference pair as (context, chosen answer, rejected answer)."""
    return pair["chosen"][:-1], pair["chosen"][-1]["content"], pair["rejected"][-1]["content"]


def position_bias(orders: np.ndarray) -> float:
    """Share of comparisons whose verdict changes when the answers change places.

    `orders` has shape (comparisons, 2): P(a ≻ b) with a in place A and with a in place B. 0 for a
    judge that ignores the order, 1 for one that always answers "A"; a probability of exactly ½ is
    no verdict and contradicts nothing.
    """
    verdicts = np.sign(np.asarray(orders, dtype=float) - 0.5)
    return float(np.mean(verdicts[:, 0] * verdicts[:, 1] < 0))


def first_place_advantage(orders: np.ndarray) -> float:
    """Mean probability given to whatever stands in place A, minus ½; 0 without a leaning."""
    values = np.asarray(orders, dtype=float)
    return float(np.mean((values[:, 0] + 1 - values[:, 1]) / 2) - 0.5)


def knockout(judge: Judge, context: Messages, answers: Sequence[str]) -> dict[str, Any]:
    """Find the best of n answers with n − 1 comparisons, round by round as in a cup.

    Returns `winner` (its index) and `matches`, a list of (i, j, P(i ≻ j)). The judge is called once
    a round with all its matches. For a transitive judge the winner is the best answer; a judge with
    cycles has none, and the draw decides. Raises ValueError without answers.
    """
    if not answers:
        raise ValueError("a knock-out needs at least one answer")
    standing, matches = list(range(len(answers))), []
    while len(standing) > 1:
        games = list(zip(standing[::2], standing[1::2], strict=False))
        odd = standing[2 * len(games) :]  # without an opponent: goes on to the next round
        chances = judge([(context, answers[i], answers[j]) for i, j in games])
        played = [(i, j, float(p)) for (i, j), p in zip(games, chances, strict=True)]
        standing = [i if p >= 0.5 else j for i, j, p in played] + odd
        matches += played
    return {"winner": standing[0], "matches": matches}


def round_robin(judge: Judge, context: Messages, answers: Sequence[str]) -> np.ndarray:
    """Let every two of n answers meet once: n(n − 1)/2 comparisons, in one call of the judge.

    Returns P(i ≻ j), shape (n, n), with P(i, j) + P(j, i) = 1 and ½ on the diagonal. An answer's
    row mean ranks it. Raises ValueError without answers.
    """
    if not answers:
        raise ValueError("a round robin needs at least one answer")
    chances = np.full((len(answers), len(answers)), 0.5)
    games = list(combinations(range(len(answers)), 2))
    if games:
        first, second = np.array(games).T
        won = judge([(context, answers[i], answers[j]) for i, j in games])
        chances[first, second], chances[second, first] = won, 1 - np.asarray(won)
    return chances


def intransitive_triples(chances: np.ndarray) -> tuple[int, int]:
    """Number of triples that run in a circle (i beats j beats k beats i), and of all triples.

    `chances` is a `round_robin`, shape (n, n). No Bradley-Terry model has such a triple, because
    its verdicts order numbers. A probability of exactly ½ beats nobody.
    """
    beats = np.asarray(chances) > 0.5
    triples = list(combinations(range(len(beats)), 3))
    circles = sum(
        bool(beats[i, j] and beats[j, k] and beats[k, i])
        or bool(beats[i, k] and beats[k, j] and beats[j, i])
        for i, j, k in triples
    )
    return circles, len(triples)
