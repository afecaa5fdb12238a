"""Algorithm 1 of the paper (section 3.2) in the world of `rlhf_guide.theory`, and its rivals.

Each round has a main agent π¹, the exact optimum for the reward fitted so far, and a way of
choosing the two policies that are compared. `EXPLORERS` holds the ways: Algorithm 1's enhancer,
the heuristics of section 3.3, and no exploration at all.

Exact here: main agent, KL, expected features, Σ_t, Γ_t. Approximate: the enhancer's maximum is
taken over a finite family of candidate policies, not over all of Π_t (`candidates`), and the
confidence radius β is an optimistic 2√d (`confidence_radius`), not the theorem's constant.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .theory import (
    Bandit,
    best_of_n_policy,
    draw,
    fit_reward,
    kl,
    mean_features,
    sample_pairs,
    temper,
    tilt,
)

BEST_OF = 8  # samples a prompt, as in the paper's released loop
TEMPERATURES = (1.0, 0.7)  # Algorithm 2, line 4
STRENGTHS = (0.5, 1.0, 2.0)  # how far candidates go, in units of the confidence radius


@dataclass(frozen=True)
class Round:
    """What is known when a round begins: main agent, fitted θ (W, d) and Σ_t (W, d, d)."""

    main: np.ndarray
    theta: np.ndarray
    covariance: np.ndarray


@dataclass(frozen=True)
class History:
    """A run of T rounds with m queries each; T + 1 states, the first before any query.

    `queries` (T + 1,), `policies` (T + 1, W, X, A) main agents as log-probabilities, `thetas`
    (T + 1, W, d) and `covariances` (T + 1, W, d, d).
    """

    queries: np.ndarray
    policies: np.ndarray
    thetas: np.ndarray
    covariances: np.ndarray


Explorer = Callable[[Bandit, Round], tuple[np.ndarray, np.ndarray]]


def offline(bandit: Bandit, state: Round) -> tuple[np.ndarray, np.ndarray]:
    """Two answers of π0, whatever has been learnt: offline data, collected in instalments."""
    return bandit.log_base, bandit.log_base


def passive(bandit: Bandit, state: Round) -> tuple[np.ndarray, np.ndarray]:
    """Two answers of the main agent: online, but without exploration."""
    return state.main, state.main


def two_temperatures(bandit: Bandit, state: Round) -> tuple[np.ndarray, np.ndarray]:
    """The main agent at temperature 1.0 against itself at 0.7 (section 3.3)."""
    high, low = (temper(state.main, temperature) for temperature in TEMPERATURES)
    return high, low


def best_against_worst(bandit: Bandit, state: Round) -> tuple[np.ndarray, np.ndarray]:
    """Best of n against worst of n by the fitted reward (section 3.3), from separate samples."""
    reward = bandit.reward_of(state.theta)
    best = best_of_n_policy(state.main, reward, BEST_OF)
    return best, best_of_n_policy(state.main, -reward, BEST_OF)


def enhancer(bandit: Bandit, state: Round) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 1, line 4: the main agent against the most uncertain policy worth its KL."""
    family = candidates(bandit, state)
    best = allowed_gain(bandit, state, family).argmax(axis=0)
    return state.main, family[best, np.arange(len(best))]


EXPLORERS: dict[str, Explorer] = {
    "offline": offline,
    "passive": passive,
    "two temperatures": two_temperatures,
    "best against worst": best_against_worst,
    "enhancer": enhancer,
}


def confidence_radius(dimension: int) -> float:
    """β = 2√d: what ‖θ̂ − θ*‖_Σ would be if every label had the variance of a coin flip, 1/4.

    Optimistic, as labels of unequal answers tell less; the theorem's constant is larger.
    """
    return 2.0 * float(np.sqrt(dimension))


def uncertainty(
    bandit: Bandit, covariance: np.ndarray, log_p: np.ndarray, log_q: np.ndarray
) -> np.ndarray:
    """‖E_p φ − E_q φ‖ in the norm of Σ⁻¹: how little the data say about p against q; (…, W)."""
    shift = mean_features(bandit, log_p) - mean_features(bandit, log_q)
    inverse = np.linalg.inv(covariance)
    return np.sqrt(np.einsum("...wd,wde,...we->...w", shift, inverse, shift))


def information_gain(bandit: Bandit, state: Round, log_policy: np.ndarray) -> np.ndarray:
    """Γ_t(π¹, π) = β ‖E φ(π¹) − E φ(π)‖ in the norm of Σ_t⁻¹ (section 3.2), shape (…, W)."""
    radius = confidence_radius(state.theta.shape[-1])
    return radius * uncertainty(bandit, state.covariance, log_policy, state.main)


def allowed_gain(bandit: Bandit, state: Round, log_policy: np.ndarray) -> np.ndarray:
    """Γ_t of policies in Π_t, and −1 for those whose KL from the main agent costs more than Γ_t."""
    gain = information_gain(bandit, state, log_policy)
    return np.where(bandit.eta * kl(log_policy, state.main) <= gain, gain, -1.0)


def error_norm(theta: np.ndarray, state: Round) -> np.ndarray:
    """‖θ − θ̂‖ in the norm of Σ_t for parameters (…, W, d): β must exceed it at θ*; (…, W)."""
    error = theta - state.theta
    return np.sqrt(np.einsum("...wd,wde,...we->...w", error, state.covariance, error))


def moved_rewards(bandit: Bandit, state: Round, directions: np.ndarray) -> np.ndarray:
    """Optima for rewards moved by ‖θ − θ̂‖_Σ = β ‖direction‖, shape (K, W, X, A).

    `directions` (K, W, d) are coordinates along the axes of the confidence ellipsoid.
    """
    values, axes = np.linalg.eigh(state.covariance)
    half_axes = confidence_radius(values.shape[-1]) * axes / np.sqrt(values)[:, None, :]
    moves = np.einsum("wde,kwe->kwd", half_axes, directions)
    return np.stack([tilt(state.main, bandit.reward_of(move), bandit.eta) for move in moves])


def candidates(bandit: Bandit, state: Round) -> np.ndarray:
    """A finite family for the enhancer's maximum, shape (K, W, X, A), the main agent first.

    For each axis of the ellipsoid ‖θ − θ̂‖_Σ ≤ β, both signs and `STRENGTHS` times its length:
    the optimum for the reward moved there. Up to strength 1 these lie in Π_t by themselves. Then
    the heuristics of section 3.3: best and worst of n, the lower temperature.
    """
    worlds, dimension = state.theta.shape
    signed = np.concatenate([sign * s * np.eye(dimension) for s in STRENGTHS for sign in (1, -1)])
    directions = np.broadcast_to(signed[:, None], (len(signed), worlds, dimension))
    heuristics = [*best_against_worst(bandit, state), two_temperatures(bandit, state)[1]]
    moved = moved_rewards(bandit, state, directions)
    return np.concatenate([state.main[None], moved, np.stack(heuristics)])


def pair_covariance(bandit: Bandit, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """E (φ1 − φ2)(φ1 − φ2)ᵀ over a prompt, a1 ~ `first`, a2 ~ `second`, exactly; (W, d, d)."""
    total = 0.0
    means = []
    for policy in (first, second):
        weighted = bandit.features * np.exp(policy)[..., None]
        means.append(weighted.sum(axis=2))
        total = total + np.einsum("wxad,wxae->wde", weighted, bandit.features)
    cross = np.einsum("wxd,wxe->wde", *means)
    return (total - cross - np.swapaxes(cross, 1, 2)) / first.shape[1]


def run_online(
    bandit: Bandit,
    explorer: Explorer,
    rounds: int,
    batch: int,
    seed: int = 0,
    ridge: float = 1.0,
    moving_reference: bool = False,
) -> History:
    """Algorithm 1 with any explorer: fit on all data, act, compare, repeat.

    Round t: π¹_t is the optimum for the reward fitted to all earlier queries (π0 in round 1);
    `batch` prompts are answered by the explorer's two policies and labelled. Σ_t counts queries,
    ridge·I + m Σ_s E[…]: m times the paper's, and β is √m times the paper's, so Γ_t is the same.
    With `moving_reference` the main agent tilts its predecessor instead of π0.
    """
    rng = np.random.default_rng([seed, 1])  # apart from the stream that drew the worlds
    worlds, dimension = bandit.theta.shape
    covariance = np.broadcast_to(ridge * np.eye(dimension), (worlds, dimension, dimension))
    states = [Round(bandit.log_base, np.zeros((worlds, dimension)), covariance)]
    data = np.zeros((worlds, 0, dimension))
    for _ in range(rounds):
        state = states[-1]
        first, second = explorer(bandit, state)
        data = np.concatenate([data, sample_pairs(bandit, first, second, batch, rng)], axis=1)
        theta = fit_reward(data, ridge, start=state.theta)
        reference = state.main if moving_reference else bandit.log_base
        main = tilt(reference, bandit.reward_of(theta), bandit.eta)
        covariance = state.covariance + batch * pair_covariance(bandit, first, second)
        states.append(Round(main, theta, covariance))
    return History(
        np.arange(rounds + 1) * batch,
        np.stack([state.main for state in states]),
        np.stack([state.theta for state in states]),
        np.stack([state.covariance for state in states]),
    )


def choose_on_validation(
    bandit: Bandit, policies: np.ndarray, answers: int, seed: int = 0
) -> np.ndarray:
    """Algorithm 1, line 7: the round whose sampled answers score best, shape (W,).

    Each policy of (T, W, X, A) gives `answers` answers to random prompts; the score is the mean
    of r* − η log π/π0, an unbiased estimate of J. All policies share prompts and random numbers.
    """
    worlds, prompts = policies.shape[1:3]
    world = np.arange(worlds)[:, None]
    scores = []
    for policy in policies:
        rng = np.random.default_rng([seed, 2])
        prompt = rng.integers(prompts, size=(worlds, answers))
        answer = draw(policy[world, prompt], rng)
        value = bandit.reward - bandit.eta * (policy - bandit.log_base)
        scores.append(value[world, prompt, answer].mean(axis=-1))
    return np.argmax(scores, axis=0)
