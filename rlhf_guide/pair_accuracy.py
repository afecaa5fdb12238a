"""How good a judge of pairs is: held-out accuracy, the length baseline, calibration.

The measures work on plain numbers, so they serve the reward model, the preference model and the
baseline that looks at nothing but length. Intervals come from `evaluation.bootstrap_mean` with the
prompt as cluster, because pairs of one prompt are not independent.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from rlhf_guide.errors import DataError


class Scorer(Protocol):
    """Anything that rewards conversations, such as `reward_model.RewardScorer`."""

    def score(self, conversations: Sequence[Any], batch_size: int = 32) -> np.ndarray: ...


def score_pairs(
    scorer: Scorer, pairs: Sequence[dict[str, Any]], batch_size: int = 32
) -> list[dict[str, Any]]:
    """Judge held-out pairs: one flat row per pair, in order.

    A row holds `prompt_id`, `section`, `source`, `chosen_kind`, `rejected_kind`, `chosen_reward`,
    `rejected_reward`, `margin` (their difference), `correct` (1, 0, or ½ for a tie) and
    `longer` (1 if the chosen answer is the longer in characters, 0 if the shorter, ½ if equal).
    The mean of `correct` is the accuracy. Real data has no sections: its `section` is the source.
    Raises DataError for a reward that is NaN or infinite.
    """
    rewards = scorer.score(
        [pair[side] for pair in pairs for side in ("chosen", "rejected")], batch_size
    )
    if bad := int((~np.isfinite(rewards)).sum()):
        raise DataError(
            f"{bad} of {len(rewards)} rewards are NaN or infinite: the reward model overflows or "
            "its weights are broken; score in float32, then retrain it."
        )
    return [
        _judged(pair, float(chosen), float(rejected))
        for pair, chosen, rejected in zip(pairs, rewards[::2], rewards[1::2], strict=True)
    ]


def _judged(pair: dict[str, Any], chosen: float, rejected: float) -> dict[str, Any]:
    names = ("prompt_id", "source", "chosen_kind", "rejected_kind")
    return {
        **{name: pair.get(name, "") for name in names},
        "section": pair.get("section") or pair.get("source", ""),
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "margin": chosen - rejected,
        "correct": step(chosen - rejected),
        "longer": chosen_is_longer(pair),
    }


def step(difference: float) -> float:
    """1 for a positive difference, 0 for a negative one, ½ for none."""
    return 0.5 if difference == 0 else float(difference > 0)


def chosen_is_longer(pair: dict[str, Any]) -> float:
    """1 if the chosen answer has more characters than the rejected one, 0 if fewer, ½ if equal."""
    return step(len(pair["chosen"][-1]["content"]) - len(pair["rejected"][-1]["content"]))


def length_baseline(
    train: Sequence[dict[str, Any]], heldout: Sequence[dict[str, Any]]
) -> tuple[str, list[float]]:
    """Judge by length alone: the rule that wins on `train`, and its score on each held-out pair.

    The rule is "longer" or "shorter"; choosing it on the training pairs keeps the baseline honest.
    A reward model that does no better has learnt nothing beyond length.
    """
    rule = "longer" if np.mean([chosen_is_longer(pair) for pair in train]) >= 0.5 else "shorter"
    longer = [chosen_is_longer(pair) for pair in heldout]
    return rule, longer if rule == "longer" else [1 - value for value in longer]


def reliability(margins: Sequence[float], bins: int = 5) -> list[dict[str, float]]:
    """Confidence against accuracy, for a reliability diagram.

    The model's confidence in its own verdict is σ(|margin|), between ½ and 1. Pairs are sorted by
    it and cut into `bins` equal groups: rows of mean `confidence`, `accuracy` and `n`.
    """
    values = np.asarray(margins, dtype=float)
    order = np.argsort(np.abs(values), kind="stable")
    groups = [values[part] for part in np.array_split(order, bins) if len(part)]
    return [
        {
            "confidence": float(np.mean(1 / (1 + np.exp(-np.abs(group))))),
            "accuracy": float(np.mean([step(value) for value in group])),
            "n": len(group),
        }
        for group in groups
    ]


def expected_calibration_error(margins: Sequence[float], bins: int = 5) -> float:
    """Mean distance of confidence and accuracy over the groups of `reliability`, in [0, 1]."""
    rows = reliability(margins, bins)
    gaps = [abs(row["accuracy"] - row["confidence"]) for row in rows]
    return float(np.average(gaps, weights=[row["n"] for row in rows]))


def calibration_error_by_chance(
    margins: Sequence[float], bins: int = 5, n_sim: int = 500, seed: int = 0
) -> float:
    """The error that a perfectly calibrated model with these confidences shows on so few pairs.

    An average of distances is never 0 on a finite sample. Here each verdict is right with exactly
    its own confidence; the mean error of `n_sim` such samples is what a measured one is held to.
    """
    sizes = np.abs(np.asarray(margins, dtype=float))
    confidence = 1 / (1 + np.exp(-sizes))
    right = np.random.default_rng(seed).random((n_sim, len(sizes))) < confidence
    errors = [expected_calibration_error(np.where(row, sizes, -sizes), bins) for row in right]
    return float(np.mean(errors))
