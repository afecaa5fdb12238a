"""RewardBench: four sections of pairs, each a weighted mean over its subsets (paper, Table 1).

    pairs = load_reward_bench("hub", allow_download=True)     # or a file, or LLMBar's folder
    verdicts = {"reward model": [row["correct"] for row in score_pairs(scorer, pairs)]}
    print(table(results(pairs, verdicts)))                    # `evaluation.table`

A verdict is 1 for the right answer, 0 for the wrong one and ½ for a tie, whatever judged: a reward
model (`pair_accuracy.score_pairs`), a pair model or a prompted language model (below). The rule
"always the longer" stands in every table: a judge that is no better has learnt nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_guide.comparisons import as_comparison
from rlhf_guide.errors import DataError, DownloadRefused
from rlhf_guide.evaluation import redraws
from rlhf_guide.files import read_jsonl
from rlhf_guide.pair_accuracy import chosen_is_longer, step
from rlhf_guide.profiles import DOWNLOAD_VARIABLE

if TYPE_CHECKING:  # they need torch or a client
    from rlhf_guide.judge_client import JudgeClient
    from rlhf_guide.preference_model import PreferenceScorer

Row = dict[str, Any]

HUB = "allenai/reward-bench"

# How much each subset counts in its section: its number of pairs, except that the 447 pairs of
# math-prm weigh as much as all of the code.
WEIGHTS = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984,
        **{f"hep-{language}": 164 for language in ("cpp", "go", "java", "js", "python", "rust")},
    },
}
SECTION_OF = {subset: section for section, subsets in WEIGHTS.items() for subset in subsets}

# LLMBar's files and the subsets that RewardBench made of them.
LLMBAR = {
    "Natural.json": "llmbar-natural",
    "Adversarial_Neighbor.json": "llmbar-adver-neighbor",
    "Adversarial_GPTInst.json": "llmbar-adver-GPTInst",
    "Adversarial_GPTOut.json": "llmbar-adver-GPTOut",
    "Adversarial_Manual.json": "llmbar-adver-manual",
}


def load_reward_bench(source: str | Path, allow_download: bool = False) -> list[Row]:
    """RewardBench's pairs in the course's format, each with its `subset` and `section`.

    `source` is `hub` (the benchmark's split `filtered`), a JSON, JSON-lines or Parquet file of its
    schema (`id, subset, prompt, chosen, rejected`), or a folder with LLMBar's files (`input`,
    `output_1`, `output_2`, `label`). Raises DownloadRefused for `hub` without `allow_download`, and
    DataError for an unknown subset, a missing field or an empty source.
    """
    if source == "hub":
        rows = _from_hub(allow_download)
    elif Path(source).is_dir():
        rows = _from_llmbar(Path(source))
    else:
        rows = _from_file(Path(source))
    if not rows:
        raise DataError(f"{source} holds no pairs of RewardBench or LLMBar.")
    return [_pair(number, row) for number, row in enumerate(rows)]


def results(
    pairs: Sequence[Row],
    verdicts: Mapping[str, Sequence[float]],
    n_boot: int = 2000,
    seed: int = 0,
) -> list[Row]:
    """One row a judge, the length rule first: an interval for each section, and their mean.

    `verdicts[judge][i]` in [0, 1] belongs to `pairs[i]`. A section's value is the mean of its
    subsets' means under `WEIGHTS`; the bootstrap redraws the pairs of each subset. A section
    without pairs is left empty, and so is then `Average`, the plain mean of the four. Raises
    DataError for another number of verdicts than of pairs.
    """
    longer = {"always the longer": [chosen_is_longer(pair) for pair in pairs]}
    return [
        {"judge": judge, **_sections(pairs, values, n_boot, seed)}
        for judge, values in {**longer, **verdicts}.items()
    ]


def coverage(pairs: Sequence[Row]) -> list[Row]:
    """One row a subset: its section, the pairs found and its weight; 0 pairs for a missing one."""
    found = [pair["subset"] for pair in pairs]
    return [
        {"section": section, "subset": subset, "pairs": found.count(subset), "weight": weight}
        for section, subsets in WEIGHTS.items()
        for subset, weight in subsets.items()
    ]


def pair_model_verdicts(model: PreferenceScorer, pairs: Sequence[Row]) -> list[float]:
    """Verdicts of a pair model, whose probability is averaged over both orders."""
    return [step(value - 0.5) for value in model.probability([as_comparison(p) for p in pairs])]


def judge_verdicts(
    client: JudgeClient, pairs: Sequence[Row], verdict_only: bool = False
) -> tuple[list[float], Row]:
    """Verdicts of a prompted language model, asked in both orders, and `judges.pairwise`'s summary.

    A pair without a verdict counts ½ as a tie does; the summary counts such failures.
    """
    from rlhf_guide.judges import AnswerPair, pairwise

    asked = [AnswerPair(pair["prompt_id"], 0, *as_comparison(pair)) for pair in pairs]
    rows, summary = pairwise(client, asked, verdict_only=verdict_only)
    return [0.5 if row["preference"] is None else row["preference"] for row in rows], summary


def _sections(
    pairs: Sequence[Row], verdicts: Sequence[float], n_boot: int, seed: int
) -> dict[str, Any]:
    if len(verdicts) != len(pairs):
        raise DataError(f"{len(verdicts)} verdicts for {len(pairs)} pairs: give one of each.")
    by_subset: dict[str, list[float]] = {}
    for pair, value in zip(pairs, verdicts, strict=True):
        by_subset.setdefault(pair["subset"], []).append(value)
    draws = {section: _draws(section, by_subset, n_boot, seed) for section in WEIGHTS}
    cells = {section: _interval(part) for section, part in draws.items()}
    whole = None
    if all(part is not None for part in draws.values()):
        whole = tuple(np.mean(part, axis=0) for part in zip(*draws.values(), strict=True))
    return {**cells, "Average": _interval(whole)}


def _draws(
    section: str, by_subset: Mapping[str, list[float]], n_boot: int, seed: int
) -> tuple[float, np.ndarray, int] | None:
    """Weighted mean of a section, the same of each redraw, and its number of pairs."""
    present = [subset for subset in WEIGHTS[section] if subset in by_subset]
    if not present:
        return None
    weights = np.array([WEIGHTS[section][subset] for subset in present], dtype=float)
    weights /= weights.sum()
    values = [np.array(by_subset[subset]) for subset in present]
    # A seed for each subset: subsets of one size must not be redrawn alike.
    seeds = [seed + list(SECTION_OF).index(subset) for subset in present]
    means = [
        redraws(len(part), n_boot, own) @ part / len(part)
        for part, own in zip(values, seeds, strict=True)
    ]
    value = float(weights @ [part.mean() for part in values])
    return value, weights @ np.array(means), sum(map(len, values))


def _interval(part: tuple[Any, np.ndarray, Any] | None) -> dict[str, float] | None:
    if part is None:
        return None
    value, means, n = part
    low, high = np.percentile(means, [2.5, 97.5])
    return {"value": float(value), "low": float(low), "high": float(high), "n": n}


def _pair(number: int, row: Row) -> Row:
    missing = [name for name in ("subset", "prompt", "chosen", "rejected") if row.get(name) is None]
    if missing:
        raise DataError(
            f"row {number} of RewardBench has no {', '.join(missing)}: it needs the fields id, "
            "subset, prompt, chosen and rejected."
        )
    if row["subset"] not in SECTION_OF:
        raise DataError(
            f"row {number} is of the subset {row['subset']!r}, which belongs to none of "
            f"RewardBench's sections; there are {', '.join(SECTION_OF)}."
        )
    question = {"role": "user", "content": row["prompt"]}
    answers = {
        side: [question, {"role": "assistant", "content": row[side]}]
        for side in ("chosen", "rejected")
    }
    return {
        "prompt_id": f"{row['subset']}-{row.get('id', number)}",
        **answers,
        "source": HUB,
        "section": SECTION_OF[row["subset"]],
        "subset": row["subset"],
    }


def _from_hub(allow_download: bool) -> list[Row]:
    if not allow_download:
        raise DownloadRefused(
            f"RewardBench from the Hub ({HUB}) is a download: allow it with {DOWNLOAD_VARIABLE}=1 "
            "or --allow-network, or give a file of its schema."
        )
    from datasets import load_dataset

    return list(load_dataset(HUB, split="filtered"))


def _from_file(path: Path) -> list[Row]:
    if not path.is_file():
        raise DataError(f"there is no file or folder {path} with RewardBench's pairs.")
    if path.suffix == ".parquet":
        import pandas as pd

        return pd.read_parquet(path).to_dict("records")
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    return read_jsonl(path)


def _from_llmbar(folder: Path) -> list[Row]:
    return [
        {
            "id": number,
            "subset": subset,
            "prompt": row["input"],
            "chosen": row[f"output_{row['label']}"],
            "rejected": row[f"output_{3 - row['label']}"],
        }
        for name, subset in LLMBAR.items()
        if (folder / name).is_file()
        for number, row in enumerate(json.loads((folder / name).read_text(encoding="utf-8")))
    ]
