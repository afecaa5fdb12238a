"""Best-of-n sampling: what choosing the best of n answers by a reward buys, and what it costs.

Choosing among more answers moves the policy away from its start. The move is known without any
training (paper, section 3.3): KL(best-of-n ‖ start) ≤ log n − (n − 1)/n. So rewards and true
utilities of the chosen answers, drawn against this bound, show how far a proxy can be trusted.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import comb

import numpy as np

from rlhf_guide.errors import DataError
from rlhf_guide.evaluation import bootstrap_mean


def best_of_n(rewards: Sequence[float], values: Sequence[float]) -> np.ndarray:
    """Expected value of the answer with the largest reward among n, for n = 1 … N.

    `rewards` and `values` belong to the same N answers to one prompt. Element n − 1 is the mean
    over all subsets of n answers: unbiased, and it wastes no sample (drawing one subset would). A
    subset's largest answer is the one of rank i in C(i − 1, n − 1) of C(N, n) subsets. Equal
    rewards share their values. Returns shape (N,); raises ValueError for unequal lengths or none.
    """
    if len(rewards) != len(values) or len(rewards) == 0:
        raise ValueError(f"{len(rewards)} rewards and {len(values)} values: give one of each.")
    _, group = np.unique(np.asarray(rewards, dtype=float), return_inverse=True)
    means = np.bincount(group, weights=np.asarray(values, dtype=float)) / np.bincount(group)
    ranked = means[np.sort(group)]
    return _shares(len(ranked)) @ ranked


@lru_cache(maxsize=8)  # the same for every prompt
def _shares(total: int) -> np.ndarray:
    """Share of the subsets of n answers (row n − 1) whose largest is the one of a rank (column)."""
    ranks = range(total)
    return np.array([[comb(r, n - 1) / comb(total, n) for r in ranks] for n in range(1, total + 1)])


def mean_gain(
    rewards: Sequence[Sequence[float]],
    values: Sequence[Sequence[float]],
    max_n: int,
    n_boot: int = 2000,
    seed: int = 0,
) -> dict[str, np.ndarray | int]:
    """What choosing the best of n by reward gains in `values` over one answer, n = 1 … max_n.

    `rewards[i][j]` and `values[i][j]` belong to answer j to prompt i. Gains, not levels: easy and
    hard prompts then weigh alike. Returns `value`, `low` and `high` of shape (max_n,), intervals
    over prompts; `curves` of shape (prompts, max_n); and `short`, the number of prompts left out
    because they have fewer than `max_n` answers. Raises DataError when all of them have.
    """
    pairs = list(zip(rewards, values, strict=True))
    enough = [best_of_n(r, v)[:max_n] for r, v in pairs if len(r) >= max_n]
    if not enough:
        raise DataError(
            f"no prompt of {len(pairs)} has {max_n} answers, so best of {max_n} cannot be "
            "estimated: draw more answers a prompt, or ask for a smaller n."
        )
    curves = np.array(enough)
    curves = curves - curves[:, :1]
    boots = [bootstrap_mean(column, None, n_boot, seed) for column in curves.T]
    bands = {key: np.array([boot[key] for boot in boots]) for key in ("value", "low", "high")}
    return {**bands, "curves": curves, "short": len(pairs) - len(enough)}


def kl_bound(n: int | np.ndarray) -> float | np.ndarray:
    """Largest KL divergence of best-of-n from its start in nats, log n − (n − 1)/n."""
    return np.log(n) - (n - 1) / n
