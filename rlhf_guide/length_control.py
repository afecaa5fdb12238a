"""Length-controlled win rate: how often would a policy win with answers as long as its rival's?

Judges, human and artificial, favour long answers. The regression of AlpacaEval 2 (Dubois et al.
2024, "Length-Controlled AlpacaEval") splits a win into what the policy and what the length earned.

Needs numpy only; nothing here loads a model.
"""

from collections.abc import Hashable, Sequence

import numpy as np

from rlhf_guide.errors import DataError
from rlhf_guide.evaluation import Interval, cluster_owners, redraws

RIDGE = 0.01  # keeps θ and φ finite where one policy wins everything; moves σ(θ) by about 0.01·θ/n
LONGEST_STEP = 1.0  # below this a Newton step always climbs: the features are at most 1
TOLERANCE = 1e-6


def length_controlled_win_rate(
    preferences: Sequence[float],
    lengths: Sequence[float],
    baseline_lengths: Sequence[float],
    prompt_ids: Sequence[Hashable] | None = None,
    n_boot: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return the win rate at equal length, with a bootstrap interval that redraws prompts.

    `preferences[i]` in [0, 1] says how much a judge prefers answer i to the baseline's answer (0.5
    is a tie), `lengths` and `baseline_lengths` are theirs, in any one unit. Fitted is

        P(answer i wins) = σ(θ + φ · tanh(Δᵢ / s)),    Δᵢ = lengths[i] − baseline_lengths[i],

    by logistic regression, with s the standard deviation of Δ. Δ is not centred, so the value
    σ(θ), the prediction at Δ = 0, belongs to equal lengths, and both policies' values sum to 1.

    This is alpaca_eval's model without its term for the difficulty of each prompt. There that
    covariate comes from one fit over many judged models; from one pair of policies it cannot be
    known (with one answer a prompt it would explain every verdict by itself). So all prompts get
    one prediction, an average over easy and hard ones. That is sound while the difference in length
    has nothing to do with the prompt; a policy that writes more exactly where it wins anyway is
    corrected too much. Further deviations: a fixed ridge in place of a cross-validated L1 penalty,
    and no added comparisons against gamed baselines.

    Besides value, low, high and n (prompts) the result holds `raw` (mean preference),
    `length_effect` (φ; above 0 the judge favours length) and `longer` (share of answers longer than
    the baseline's: near 0 or 1 nothing was seen on one side of equal length, and the value
    is an extrapolation). Raises DataError for unequally many values, a preference outside [0, 1] or
    a Δ that never varies.
    """
    y, delta = _checked(preferences, lengths, baseline_lengths)
    names = range(len(y)) if prompt_ids is None else prompt_ids
    if len(names) != len(y):
        raise DataError(f"{len(y)} preferences but {len(names)} prompt ids.")
    owner = cluster_owners(names, len(y))
    feature = np.tanh(delta / delta.std())
    theta, phi = _fit(feature, y, np.ones((1, len(y))))[0]
    count = owner.max() + 1
    draws = redraws(int(count), n_boot, seed)
    redrawn = _sigmoid(_fit(feature, y, draws[:, owner])[:, 0])
    low, high = np.percentile(redrawn, [2.5, 97.5])
    value = float(_sigmoid(theta))
    return {
        "value": value,
        "low": min(float(low), value),
        "high": max(float(high), value),
        "n": int(count),
        "raw": float(y.mean()),
        "length_effect": float(phi),
        "longer": float((delta > 0).mean()),
    }


def _checked(
    preferences: Sequence[float], lengths: Sequence[float], baseline_lengths: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Preferences and length differences as arrays of one length; DataError where they are none."""
    columns = [np.asarray(c, dtype=float) for c in (preferences, lengths, baseline_lengths)]
    y, own, other = columns
    if not len(y) == len(own) == len(other) or len(y) == 0:
        raise DataError(
            f"{len(y)} preferences, {len(own)} lengths and {len(other)} baseline lengths: give one "
            "of each for every comparison."
        )
    if not all(np.isfinite(column).all() for column in columns) or y.min() < 0 or y.max() > 1:
        raise DataError(
            "preferences must lie in [0, 1] and lengths be finite: leave out comparisons without "
            "a verdict, and turn scores into preferences first."
        )
    delta = own - other
    if np.ptp(delta) == 0:
        raise DataError(
            f"every answer differs from the baseline's by {delta[0]:g}, so the effect of length "
            "cannot be seen: report the raw win rate."
        )
    return y, delta


def _fit(feature: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(θ, φ) of one ridge-penalised logistic regression a row of `weights`; shape (fits, 2).

    Newton's method on all fits at once; `feature` and `y` have shape (n,), `weights` (fits, n).
    """
    design = np.stack([np.ones_like(feature), feature], axis=1)
    outer = (design[:, :, None] * design[:, None, :]).reshape(-1, 4)
    beta = np.zeros((len(weights), 2))
    step = np.ones_like(beta)
    while np.abs(step).max() > TOLERANCE:
        p = _sigmoid(beta @ design.T)
        gradient = (weights * (y - p)) @ design - RIDGE * beta
        curvature = ((weights * p * (1 - p)) @ outer).reshape(-1, 2, 2) + RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        size = np.linalg.norm(step, axis=1, keepdims=True)
        step /= np.maximum(1, size / LONGEST_STEP)
        beta += step
    return beta


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))
