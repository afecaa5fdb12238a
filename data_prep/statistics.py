"""Statistics of preference records, source by source: Table 5 of the paper and what it leaves out.

Counts are over all pairs; token lengths are means over a seeded sample of pairs, whose size is
stated, because a tokenizer is slow and a mean needs few rows.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

from data_prep.pairing import seeded
from data_prep.schema import DataError, Message, PreferencePair

CountTokens = Callable[[str], int]


def source_statistics(
    pairs: Sequence[PreferencePair],
    count_tokens: CountTokens,
    sample: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """One row of Table 5, with the share of pairs whose chosen answer is the longer one.

    `count_tokens` gives the number of tokens of a text. Lengths are means over `sampled` pairs:
    `prompt_tokens` of all turns but the last, `chosen_tokens` and `rejected_tokens` of the answers.
    `longer_chosen` compares characters over all pairs, equal lengths counting one half; `turns`
    counts pairs by the number of user turns; `histograms` bins the lengths of the sample. Raises
    DataError when there are no pairs.
    """
    if not pairs:
        raise DataError("there are no pairs to describe: every row was dropped, or none was read")
    drawn = _sample(pairs, sample, seed)
    tokens = [token_lengths(pair, count_tokens) for pair in drawn]
    return {
        "prompts": len({pair["prompt_id"] for pair in pairs}),
        **{
            f"{part}_tokens": fmean(lengths[part] for lengths in tokens)
            for part in ("prompt", "chosen", "rejected")
        },
        "pairs": len(pairs),
        "sampled": len(drawn),
        "longer_chosen": fmean(map(chosen_is_longer, pairs)),
        "turns": dict(sorted(Counter(len(pair["chosen"]) // 2 for pair in pairs).items())),
        "histograms": {
            part: length_histogram(lengths[part] for lengths in tokens)
            for part in ("prompt", "chosen", "rejected")
        },
    }


def token_lengths(pair: PreferencePair, count_tokens: CountTokens) -> dict[str, int]:
    """Tokens of the prompt (all turns but the last) and of both answers, templates left out."""
    return {
        "prompt": sum(count_tokens(turn["content"]) for turn in pair["chosen"][:-1]),
        "chosen": count_tokens(_answer(pair["chosen"])),
        "rejected": count_tokens(_answer(pair["rejected"])),
    }


def chosen_is_longer(pair: PreferencePair) -> float:
    """1 if the chosen answer has more characters than the rejected, 0 if fewer, else 0.5."""
    gap = len(_answer(pair["chosen"])) - len(_answer(pair["rejected"]))
    return 0.5 + 0.5 * ((gap > 0) - (gap < 0))


def length_histogram(lengths: Iterable[int], width: int = 50) -> dict[int, int]:
    """Counts by bins of `width`, keyed by the lower edge; empty bins between are 0."""
    counts = Counter(length // width for length in lengths)
    if not counts:
        return {}
    return {bin * width: counts[bin] for bin in range(max(counts) + 1)}


def _sample(pairs: Sequence[PreferencePair], size: int, seed: int) -> list[PreferencePair]:
    if len(pairs) <= size:
        return list(pairs)
    return seeded("statistics", seed).sample(list(pairs), size)


def _answer(messages: Sequence[Message]) -> str:
    return messages[-1]["content"]
