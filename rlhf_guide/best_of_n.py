"""Best-of-n sampling: what choosing the best of n answers by a reward buys, and what it costs.

Choosing among more answers moves the policy away from its start. The move is known without any
training (paper, section 3.3): KL(best-of-n ‖ start) ≤ log n − (n − 1)/n. So rewards and true
utilities of the chosen answers, drawn against this bound, show how far a proxy can be trusted.
"""

from collections.abc import Sequence
from math import comb

import numpy as np


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
    total = len(ranked)
    shares = [
        [comb(rank, n - 1) / comb(total, n) for rank in range(total)] for n in range(1, total + 1)
    ]
    return np.array(shares) @ ranked


def kl_bound(n: int | np.ndarray) -> float | np.ndarray:
    """Largest KL divergence of best-of-n from its start in nats, log n − (n − 1)/n."""
    return np.log(n) - (n - 1) / n
