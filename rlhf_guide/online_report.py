"""The numbers that each iteration of online DPO leaves behind, and one line to print them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_guide.evaluation import bootstrap_mean, judge, plain


def response_summary(rows: Sequence[Mapping]) -> dict[str, float]:
    """Count generated answers and describe their length: a drift towards length shows here first.

    ``cut`` is the share that reached the token limit, ``empty`` the share of blank answers.
    """
    responses = [response for row in rows for response in row["responses"]]
    return {
        "prompts": len(rows),
        "responses": len(responses),
        "tokens": float(np.mean([response["n_tokens"] for response in responses])),
        "characters": float(np.mean([len(response["text"]) for response in responses])),
        "cut": float(np.mean([response["finish_reason"] == "length" for response in responses])),
        "empty": float(np.mean([not response["text"].strip() for response in responses])),
    }


def annotation_metrics(rows: Sequence[Mapping]) -> dict[str, float]:
    """Average over prompts the mean, best and worst reward of a prompt's answers."""
    rewards = [row["rewards"] for row in rows]
    return {
        "reward": float(np.mean([np.mean(values) for values in rewards])),
        "best_reward": float(np.mean([np.max(values) for values in rewards])),
        "worst_reward": float(np.mean([np.min(values) for values in rewards])),
        **response_summary(rows),
    }


def validation_metrics(rows: Sequence[Mapping], n_boot: int, seed: int) -> dict[str, Any]:
    """Return mean reward and, where prompts carry facts, mean true utility, with intervals."""
    owners = [row["prompt_id"] for row in rows for _ in row["rewards"]]
    rewards = [value for row in rows for value in row["rewards"]]
    truth = None
    if all("facts" in row for row in rows):
        utilities = [answer["utility"] for answer in judge(rows)]
        truth = plain(bootstrap_mean(utilities, owners, n_boot, seed))
    return {
        "reward": plain(bootstrap_mean(rewards, owners, n_boot, seed)),
        "utility": truth,
        **response_summary(rows),
    }


def iteration_row(
    t: int, annotation: Mapping, pairs: Mapping, trained: Mapping, validation: Mapping
) -> dict[str, Any]:
    """Join the metrics of one iteration's stages into a flat row for tables and plots."""
    return {
        "iteration": t,
        **{key: annotation[key] for key in ("prompts", "responses", "tokens", "cut", "reward")},
        **{key: annotation[key] for key in ("best_reward", "worst_reward")},
        **{key: value for key, value in pairs.items() if key != "prompts"},
        **{f"dpo_{key}": value for key, value in trained.items() if key != "pairs"},
        **{f"validation_{key}": value for key, value in validation.items()},
    }


def describe(row: Mapping) -> str:
    """Return one progress line for a finished iteration."""
    reward = row["validation_reward"]
    return (
        f"iteration {row['iteration']}: {row['pairs']} pairs from {row['prompts']} prompts, "
        f"sample reward {row['reward']:+.2f} (best {row['best_reward']:+.2f}), "
        f"validation reward {reward['value']:+.2f} [{reward['low']:+.2f}, {reward['high']:+.2f}], "
        f"{row['validation_tokens']:.0f} tokens an answer"
    )
