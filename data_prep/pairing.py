"""From scored answers of one prompt to preference pairs.

Table 5 of the paper uses all pairs of a prompt's answers but ties. Version 1 of the authors' blog
takes the best answer against a random other. Both are here, with a minimum margin (appendix B.1
removes pairs with small margins, its threshold is not published; 0 removes exact ties only).
"""

import hashlib
import random
from collections.abc import Callable, Iterable
from itertools import combinations
from typing import Any

from data_prep.filters import check_not_empty, prompt_id
from data_prep.schema import DataError, Message, PreferencePair
from data_prep.source import Drop, Rejected

Scored = tuple[str, float]  # an answer and its score, higher is better
Pairs = list[tuple[Scored, Scored]]  # (chosen, rejected)
Dropped = list[tuple[str, tuple[Scored, Scored]]]  # (reason, the two answers)

RULES = ("all", "best_vs_random", "best_vs_last")


def seeded(*key: Any) -> random.Random:
    """A random generator that depends on the key only: not on process, platform or order."""
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode("utf-8")).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))


def all_pairs(scored: list[Scored], min_margin: float = 0.0) -> tuple[Pairs, Dropped]:
    """Every pair of answers whose scores differ by at least `min_margin`, never a tie.

    Of n answers, the n(n-1)/2 pairs are either returned or in the second list with their reason:
    `identical_answers`, `tie` or `small_margin`.
    """
    pairs, dropped = [], []
    for first, second in combinations(scored, 2):
        pair = (first, second) if first[1] >= second[1] else (second, first)
        reason = _pair_reason(*pair, min_margin)
        if reason is None:
            pairs.append(pair)
        else:
            dropped.append((reason, pair))
    return pairs, dropped


def best_vs_random(
    scored: list[Scored], rng: random.Random, min_margin: float = 0.0
) -> tuple[Pairs, Dropped]:
    """One pair: the best answer and a random one of those that are worse by the margin.

    The blog does not say how it treats ties. Drawing among worse answers only is this guide's
    choice. Every other answer is dropped: those that cannot lose to the best with its reason, the
    rest as `not_drawn`. Of equally good answers the first counts as the best.
    """
    best = max(scored, key=_score)
    return _one_pair(scored, best, rng.choice, min_margin)


def best_vs_last(scored: list[Scored], min_margin: float = 0.0) -> tuple[Pairs, Dropped]:
    """One pair: the best answer and the worst; of equally bad answers the last."""
    best = max(scored, key=_score)
    return _one_pair(scored, best, lambda worse: min(reversed(worse), key=_score), min_margin)


def read_answers(
    candidates: Iterable[Any], read: Callable[[Any], Scored], drop: Drop
) -> list[Scored]:
    """Read each candidate as (answer, score); drop, with its reason, one that cannot be read."""
    scored = []
    for candidate in candidates:
        try:
            answer, score = read(candidate)
            scored.append((check_not_empty(answer), score))
        except Rejected as rejected:
            drop(rejected.reason, candidate)
    return scored


def paired_records(
    source: str,
    messages: list[Message],
    scored: list[Scored],
    drop: Drop,
    pairs: str = "all",
    min_margin: float = 0.0,
    seed: int = 0,
) -> list[PreferencePair]:
    """The pairs of one prompt, by one of `RULES`, as records; the answers must not be empty.

    `messages` must have passed `filters.check_prompt`. Raises `Rejected` with `too_few_answers`
    and DataError for an unknown rule.
    """
    if pairs not in RULES:
        raise DataError(f"unknown pair rule {pairs!r}; the rules are {', '.join(RULES)}")
    if len(scored) < 2:
        raise Rejected("too_few_answers")
    name = prompt_id(source, messages)
    if pairs == "all":
        kept, dropped = all_pairs(scored, min_margin)
    elif pairs == "best_vs_random":
        kept, dropped = best_vs_random(scored, seeded(seed, name), min_margin)
    else:
        kept, dropped = best_vs_last(scored, min_margin)
    for reason, pair in dropped:
        drop(reason, {"prompt": messages, "answers": pair})
    return [_record(source, name, messages, chosen, rejected) for chosen, rejected in kept]


def one_record(
    source: str,
    messages: list[Message],
    chosen: str,
    rejected: str,
    scores: tuple[float, float] | None = None,
) -> PreferencePair:
    """A record of a pair that the source itself ranked; `scores` are (chosen, rejected).

    `messages` must have passed `filters.check_prompt`. Raises `Rejected` with `empty_turn`,
    `identical_answers`, `label_contradicts_scores` or `tie`.
    """
    check_not_empty(chosen)
    check_not_empty(rejected)
    if chosen == rejected:
        raise Rejected("identical_answers")
    high, low = scores or (None, None)
    if scores and high <= low:
        raise Rejected("tie" if high == low else "label_contradicts_scores")
    name = prompt_id(source, messages)
    return _record(source, name, messages, (chosen, high), (rejected, low))


def _score(answer: Scored) -> float:
    return answer[1]


def _pair_reason(better: Scored, worse: Scored, min_margin: float) -> str | None:
    if better[0] == worse[0]:
        return "identical_answers"
    margin = better[1] - worse[1]
    if margin <= 0:
        return "tie"
    return "small_margin" if margin < min_margin else None


def _one_pair(
    scored: list[Scored], best: Scored, choose: Callable, min_margin: float
) -> tuple[Pairs, Dropped]:
    worse, dropped = [], []
    for answer in scored:
        if answer is best:
            continue
        reason = _pair_reason(best, answer, min_margin)
        if reason is None:
            worse.append(answer)
        else:
            dropped.append((reason, (best, answer)))
    if not worse:
        return [], dropped
    loser = choose(worse)
    dropped += [("not_drawn", (best, answer)) for answer in worse if answer is not loser]
    return [(best, loser)], dropped


def _record(
    source: str, name: str, messages: list[Message], chosen: tuple, rejected: tuple
) -> PreferencePair:
    return {
        "prompt_id": name,
        "chosen": [*messages, {"role": "assistant", "content": chosen[0]}],
        "rejected": [*messages, {"role": "assistant", "content": rejected[0]}],
        "chosen_score": chosen[1],
        "rejected_score": rejected[1],
        "source": source,
    }
