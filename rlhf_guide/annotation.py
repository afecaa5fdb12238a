"""Rewards for generated answers (paper, section 3.3): every response gets one number.

    rows = annotate(generations, RewardScorer(folder), "rewards.jsonl")
    rows[0]["rewards"]      # aligned with rows[0]["responses"]

Rows are written while they come, so a killed run goes on where it stopped. Rewards of two models
live on different scales: rows of another model in the output file are never kept.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_guide.errors import DataError
from rlhf_guide.files import append_jsonl, read_jsonl, write_jsonl
from rlhf_guide.pair_accuracy import Scorer

CHUNK = 32  # prompts scored between two writes


def annotate(
    generations: Sequence[dict[str, Any]],
    scorer: Scorer,
    out_path: str | Path,
    reward_model: str | None = None,
    batch_size: int = 32,
) -> list[dict[str, Any]]:
    """Score every response of every prompt; return and store the annotation rows in input order.

    A row is its generation plus `rewards` (floats aligned with `responses`) and `reward_model`
    (a name with the hash of the weights; by default the scorer's `name`). Rows already in
    `out_path` are kept if the same model scored the same responses. Raises DataError for a reward
    that is NaN or infinite, naming the prompt, and for a prompt without responses or twice given.
    """
    name = reward_model or scorer.name
    _check(generations)
    done = _finished(Path(out_path), name)
    waiting = [row for row in generations if not _is_done(row, done)]
    write_jsonl(out_path, [done[row["prompt_id"]] for row in generations if _is_done(row, done)])
    for start in range(0, len(waiting), CHUNK):
        fresh = _scored(waiting[start : start + CHUNK], scorer, name, batch_size)
        append_jsonl(out_path, fresh)
        done |= {row["prompt_id"]: row for row in fresh}
    rows = [done[row["prompt_id"]] for row in generations]
    write_jsonl(out_path, rows)
    return rows


def annotation_summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Counts and means to log: prompts, responses, empty answers, mean and best-of-n reward."""
    rewards = [row["rewards"] for row in rows]
    texts = [response["text"] for row in rows for response in row["responses"]]
    return {
        "prompts": len(rows),
        "responses": len(texts),
        "empty_responses": sum(not text.strip() for text in texts),
        "mean_reward": float(np.mean(np.concatenate(rewards))),
        "mean_best_reward": float(np.mean([max(values) for values in rewards])),
    }


def _scored(
    generations: Sequence[dict[str, Any]], scorer: Scorer, name: str, batch_size: int
) -> list[dict[str, Any]]:
    conversations = [
        [*row["messages"], {"role": "assistant", "content": response["text"]}]
        for row in generations
        for response in row["responses"]
    ]
    rewards = iter(scorer.score(conversations, batch_size=batch_size))
    rows = []
    for row in generations:
        values = [float(next(rewards)) for _ in row["responses"]]
        _refuse_bad_rewards(row["prompt_id"], values)
        rows.append({**row, "rewards": values, "reward_model": name})
    return rows


def _refuse_bad_rewards(prompt_id: str, rewards: list[float]) -> None:
    bad = [index for index, value in enumerate(rewards) if not np.isfinite(value)]
    if bad:
        raise DataError(
            f"the reward of response {bad[0]} to prompt {prompt_id!r} is {rewards[bad[0]]}: the "
            "reward model overflows or its weights are broken; score in float32, then retrain it."
        )


def _check(generations: Sequence[dict[str, Any]]) -> None:
    seen: set[str] = set()
    for row in generations:
        if row["prompt_id"] in seen:
            raise DataError(f"prompt {row['prompt_id']!r} is given twice; ids must be unique.")
        if not row["responses"]:
            raise DataError(f"prompt {row['prompt_id']!r} has no responses; generate them again.")
        seen.add(row["prompt_id"])


def _finished(path: Path, name: str) -> dict[str, dict[str, Any]]:
    rows = read_jsonl(path) if path.exists() else []
    return {row["prompt_id"]: row for row in rows if row["reward_model"] == name}


def _is_done(row: dict[str, Any], done: dict[str, dict[str, Any]]) -> bool:
    stored = done.get(row["prompt_id"])
    return stored is not None and stored["responses"] == row["responses"]
