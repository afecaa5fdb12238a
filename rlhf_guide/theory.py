"""A world where everything is known: the linear Bradley–Terry contextual bandit, solved exactly.

Prompts and answers are finite, so every expectation of the paper's sections 1.2 and 3.2 is a sum
and nothing is estimated but the reward. All arrays carry a leading axis of independent worlds
(one seed each), so that a curve over many seeds costs little more than one.

Shapes: W worlds, X prompts (all equally likely), A answers, d features. A policy is an array
(W, X, A) of log-probabilities; rewards are (W, X, A). KL divergences and rewards are in nats and
in units of the Bradley–Terry logit. Needs numpy only.
"""

from dataclasses import dataclass

import numpy as np

from .errors import DataError


@dataclass(frozen=True)
class Bandit:
    """W worlds: `features` (W, X, A, d), the true `theta` (W, d), `log_base` = log π0, and η."""

    features: np.ndarray
    theta: np.ndarray
    log_base: np.ndarray
    eta: float

    @property
    def reward(self) -> np.ndarray:
        """The true reward r*(x, a) = ⟨θ*, φ(x, a)⟩, shape (W, X, A)."""
        return self.reward_of(self.theta)

    @property
    def optimum(self) -> np.ndarray:
        """The policy π* that maximises J (paper, Eq. 3)."""
        return tilt(self.log_base, self.reward, self.eta)

    def reward_of(self, theta: np.ndarray) -> np.ndarray:
        """The reward ⟨θ, φ(x, a)⟩ of any parameter (W, d), shape (W, X, A)."""
        return np.einsum("wxad,wd->wxa", self.features, theta)


def make_bandit(
    worlds: int = 40,
    prompts: int = 16,
    answers: int = 16,
    dimension: int = 8,
    eta: float = 0.25,
    rare_mass: float = 0.02,
    seed: int = 0,
) -> Bandit:
    """Random worlds in which half the answers are rare, and only they show half the features.

    An answer's features are a random unit vector in the first half of the coordinates (common
    answers) or in the second half (rare ones); θ* is standard normal, so rewards have standard
    deviation 1 whatever the dimension. π0 gives the rare answers `rare_mass` together, and inside
    each half log-probabilities vary with standard deviation 1. Raises DataError unless `answers`
    and `dimension` are even and `rare_mass` lies strictly between 0 and 1.
    """
    if answers % 2 or dimension % 2 or not 0 < rare_mass < 1:
        raise DataError(
            f"answers {answers} and dimension {dimension} must be even (half is rare), and "
            f"rare_mass {rare_mass} strictly between 0 and 1."
        )
    rng = np.random.default_rng(seed)
    half, part = answers // 2, dimension // 2
    features = np.zeros((worlds, prompts, answers, dimension))
    directions = rng.normal(size=(worlds, prompts, answers, part))
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    features[:, :, :half, :part] = directions[:, :, :half]
    features[:, :, half:, part:] = directions[:, :, half:]
    logits = rng.normal(size=(worlds, prompts, 2, half))
    masses = np.log([1 - rare_mass, rare_mass])
    log_base = (normalise(logits) + masses[:, None]).reshape(worlds, prompts, answers)
    return Bandit(features, rng.normal(size=(worlds, dimension)), log_base, eta)


def normalise(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities from logits, along the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def tilt(log_policy: np.ndarray, reward: np.ndarray, eta: float) -> np.ndarray:
    """The optimum π ∝ π_ref exp(r/η) for a reward and a reference policy (paper, Eq. 3)."""
    return normalise(log_policy + reward / eta)


def temper(log_policy: np.ndarray, temperature: float) -> np.ndarray:
    """The policy sampled at a temperature: π^(1/T), normalised."""
    return normalise(log_policy / temperature)


def best_of_n_policy(log_policy: np.ndarray, reward: np.ndarray, n: int) -> np.ndarray:
    """The exact distribution of the best of n samples; ties are broken at random.

    With F(a) the mass of answers with reward at most r(a) and G(a) the mass strictly below,
    π_n(a) / π(a) = (Fⁿ − Gⁿ) / (F − G) = Σ_k F^k G^(n−1−k), which is never above n. The worst of
    n is the best for the reward −r.
    """
    policy = np.exp(log_policy)[..., None, :]
    other, own = reward[..., None, :], reward[..., :, None]
    below = (policy * (other < own)).sum(axis=-1)
    up_to = (policy * (other <= own)).sum(axis=-1)
    ratio = sum(up_to**k * below ** (n - 1 - k) for k in range(n))
    return log_policy + np.log(np.maximum(ratio, np.finfo(float).tiny))  # 0 only by underflow


def kl(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """KL(p ‖ q) in nats, averaged over prompts: (…, X, A) to (…)."""
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean(axis=-1)


def total_variation(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """Total variation distance of each prompt's two distributions: (…, X, A) to (…, X)."""
    return 0.5 * np.abs(np.exp(log_p) - np.exp(log_q)).sum(axis=-1)


def expected(log_policy: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The mean of values (…, X, A) over prompts and the policy's answers, shape (…)."""
    return (np.exp(log_policy) * values).sum(axis=-1).mean(axis=-1)


def mean_features(bandit: Bandit, log_policy: np.ndarray) -> np.ndarray:
    """E φ(x, a) over prompts and the policy's answers: (…, W, X, A) to (…, W, d)."""
    worlds, prompts, _, dimension = bandit.features.shape
    probabilities = np.exp(log_policy).reshape(*log_policy.shape[:-2], 1, -1)
    total = probabilities @ bandit.features.reshape(worlds, -1, dimension)
    return total[..., 0, :] / prompts


def objective(bandit: Bandit, log_policy: np.ndarray) -> np.ndarray:
    """J(π) = E r* − η KL(π ‖ π0), exactly (paper, Eq. 2); one number a world."""
    return expected(log_policy, bandit.reward) - bandit.eta * kl(log_policy, bandit.log_base)


def suboptimality(bandit: Bandit, log_policy: np.ndarray) -> np.ndarray:
    """J(π*) − J(π), which equals η KL(π ‖ π*) and is computed so: no cancellation near zero."""
    return bandit.eta * kl(log_policy, bandit.optimum)


def theorem_gap(bandit: Bandit, log_policy: np.ndarray) -> np.ndarray:
    """The left side of Theorem 1 (section 3.2): J(π*) − J(π) + η KL(π* ‖ π), one a world."""
    return suboptimality(bandit, log_policy) + bandit.eta * kl(bandit.optimum, log_policy)


def log_density_ratio(bandit: Bandit) -> np.ndarray:
    """The largest log π*(a|x)/π0(a|x) of each world: what offline data must cover (section 1.1)."""
    return (bandit.optimum - bandit.log_base).max(axis=(-2, -1))


def at_divergence(bandit: Bandit, reward: np.ndarray, divergence: float) -> np.ndarray:
    """The policy ∝ π0 exp(c r) whose KL from π0 is `divergence` in each world, c by bisection.

    KL grows with c, up to the policy that always takes the best answer; a divergence beyond that
    raises DataError.
    """
    low, high = np.zeros(len(reward)), np.full(len(reward), 1e4)

    def policy(scale: np.ndarray) -> np.ndarray:
        return normalise(bandit.log_base + scale[:, None, None] * reward)

    if (reach := kl(policy(high), bandit.log_base).min()) < divergence:
        raise DataError(
            f"A KL of {divergence} nats is out of reach: some world ends at {reach:.2f}."
        )
    for _ in range(80):
        middle = (low + high) / 2
        short = kl(policy(middle), bandit.log_base) < divergence
        low, high = np.where(short, middle, low), np.where(short, high, middle)
    return policy(high)


def sample_pairs(
    bandit: Bandit, first: np.ndarray, second: np.ndarray, size: int, rng: np.random.Generator
) -> np.ndarray:
    """Ask the preference oracle `size` questions in every world (paper, Def. 1, Eq. 1 and 6).

    A prompt at random, a1 ~ `first`, a2 ~ `second`, and a Bradley–Terry label. Returns
    φ(winner) − φ(loser), shape (W, size, d): all that a linear reward can learn from them.
    """
    worlds, prompts = first.shape[:2]
    world = np.arange(worlds)[:, None]
    prompt = rng.integers(prompts, size=(worlds, size))
    chosen = [draw(policy[world, prompt], rng) for policy in (first, second)]
    phi = [bandit.features[world, prompt, answer] for answer in chosen]
    reward = [bandit.reward[world, prompt, answer] for answer in chosen]
    first_wins = rng.random((worlds, size)) < sigmoid(reward[0] - reward[1])
    return np.where(first_wins, 1.0, -1.0)[..., None] * (phi[0] - phi[1])


def draw(log_policy: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One answer from each distribution along the last axis."""
    cumulative = np.exp(log_policy).cumsum(axis=-1)
    point = rng.random(cumulative.shape[:-1])[..., None] * cumulative[..., -1:]
    return (cumulative <= point).sum(axis=-1)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """The logistic function σ."""
    return 0.5 * (1 + np.tanh(x / 2))


def fit_reward(
    differences: np.ndarray, ridge: float = 1.0, start: np.ndarray | None = None, steps: int = 50
) -> np.ndarray:
    """The Bradley–Terry maximum-likelihood reward with a ridge (paper, Eq. 4), by Newton's method.

    Minimises −Σ log σ(⟨θ, z⟩) + ridge ‖θ‖² / 2 over `differences` z = φ(winner) − φ(loser) of
    shape (W, N, d), from `start` (W, d) or zero. A ridge of 1 is the worlds' own prior,
    θ* ~ N(0, I). Returns θ (W, d). Raises DataError when Newton's method has not converged.
    """
    worlds, _, dimension = differences.shape
    theta = np.zeros((worlds, dimension)) if start is None else start
    transposed = np.swapaxes(differences, 1, 2)
    for _ in range(steps):
        wins = sigmoid(differences @ theta[..., None])
        gradient = ridge * theta[..., None] - transposed @ (1 - wins)
        curvature = transposed @ (differences * (wins * (1 - wins))) + ridge * np.eye(dimension)
        step = np.linalg.solve(curvature, gradient)[..., 0]
        theta = theta - step
        if np.abs(step).max(initial=0.0) < 1e-8:
            return theta
    raise DataError(f"The reward did not converge in {steps} Newton steps: raise ridge ({ridge}).")


def dpo_on_all_pairs(
    bandit: Bandit, steps: int = 10, weights: np.ndarray | None = None
) -> np.ndarray:
    """DPO on the whole population: every pair of answers with its exact probability of winning.

    Newton's method on Eq. 5 for a tabular policy, started at π0, in the coordinates
    u = η log π/π0 (the implicit reward), in which the loss is convex. `weights` (A, A), symmetric,
    says how often each pair is compared (default: equally often); a pair of weight 0 is never
    seen. Returns the policies after 0 … `steps` steps, shape (steps + 1, W, X, A).
    """
    reward = bandit.reward
    answers = reward.shape[-1]
    weights = np.ones((answers, answers)) if weights is None else weights
    preferred = sigmoid(reward[..., :, None] - reward[..., None, :])
    implicit = np.zeros_like(reward)
    path = [bandit.log_base]
    for _ in range(steps):
        model = sigmoid(implicit[..., :, None] - implicit[..., None, :])
        gradient = (weights * (model - preferred)).sum(axis=-1)
        slope = weights * model * (1 - model)
        curvature = slope.sum(axis=-1)[..., None] * np.eye(answers) - slope
        # Adding a constant to u changes nothing, so the curvature is singular by one dimension.
        inverse = np.linalg.pinv(curvature, hermitian=True, rcond=1e-10)
        implicit = implicit - np.einsum("wxab,wxb->wxa", inverse, gradient)
        path.append(tilt(bandit.log_base, implicit, bandit.eta))
    return np.stack(path)
