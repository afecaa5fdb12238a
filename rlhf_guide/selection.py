"""From n answers a prompt to one preference pair (Algorithm 2, line 5, and Eq. 9).

By rewards (`build_pairs`), four strategies; the paper uses ``best_worst``. A length penalty is part
of the reward that ranks *and* orients the pair. (The released script chose with the penalised
reward and then put the two answers in the order of the raw one, so a penalised winner could end up
as the rejected answer.) By a pairwise judge (`build_judged_pairs`): the paper leaves that to future
work and ranks by rewards, which cost one pass an answer and take the penalty.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rlhf_guide.comparisons import Judge, knockout
from rlhf_guide.errors import DataError, ParameterError

DROP_REASONS = ("too_few", "identical", "tie", "empty")
_NOT_CARRIED = {"responses", "rewards", "messages", "model", "reward_model"}


def build_pairs(
    annotated: Sequence[Mapping],
    strategy: str = "best_worst",
    length_penalty: float = 0.0,
    seed: int = 0,
    iteration: int = 1,
) -> tuple[list[dict], dict[str, float]]:
    """Return at most one DPO pair a prompt, and how many prompts gave none and why.

    ``annotated`` are annotation records (``responses`` aligned with ``rewards``). The ranking uses
    ``r − length_penalty · characters`` (Eq. 9). Answers that repeat another one word for word are
    merged first: a model cannot prefer a text to itself, whatever batch noise its rewards carry.
    A prompt is dropped, and counted under ``dropped_<reason>``, when it has fewer than two answers
    (``too_few``) or one distinct answer (``identical``), when the two picked are equally good
    (``tie``) or when the winner is blank (``empty``).

    Raises ParameterError for an unknown strategy, DataError for rewards that are missing, not
    finite or not aligned.
    """
    if strategy not in STRATEGIES:
        raise ParameterError(
            f"Unknown pair strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}."
        )
    pairs, dropped = [], dict.fromkeys(DROP_REASONS, 0)
    for record in annotated:
        found = _pair_of(record, strategy, length_penalty, seed, iteration)
        if isinstance(found, str):
            dropped[found] += 1
        else:
            pairs.append(found)
    return pairs, _counts(len(annotated), pairs, dropped)


def build_judged_pairs(
    annotated: Sequence[Mapping], judge: Judge, iteration: int = 1
) -> tuple[list[dict], dict[str, float]]:
    """Return what `build_pairs` returns, ranked by P(a ≻ b | x) instead of rewards.

    Of m distinct answers the best wins a knock-out (m − 1 comparisons). The worst wins one among
    the others in which every verdict is reversed (m − 2). The two then meet, and their scores are
    P(best ≻ worst) and its complement; so ``margin`` is 2P − 1. ``tie`` counts the prompts where
    P ≤ ½ there: a judge whose verdicts run in a circle has no order to learn from. The rewards are
    carried along but choose nothing.
    """
    pairs, dropped = [], dict.fromkeys(DROP_REASONS, 0)
    for record in annotated:
        found = _judged_pair_of(record, judge, iteration)
        if isinstance(found, str):
            dropped[found] += 1
        else:
            pairs.append(found)
    return pairs, _counts(len(annotated), pairs, dropped)


def penalised_rewards(
    rewards: Sequence[float], texts: Sequence[str], length_penalty: float
) -> np.ndarray:
    """Return ``r − λ|a|`` (Eq. 9); λ is per *character*, as in the paper (0.001 there)."""
    characters = np.array([len(text) for text in texts], dtype=float)
    return np.asarray(rewards, dtype=float) - length_penalty * characters


def best_worst(scores: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """Pick the highest and the lowest score: the pair of the paper's recipe."""
    return int(np.argmax(scores)), int(np.argmin(scores))


def best_second(scores: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """Pick the two highest scores: the hardest comparison, with the noisiest label."""
    order = np.argsort(-scores, kind="stable")
    return int(order[0]), int(order[1])


def best_random(scores: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """Pick the highest score and any other answer, drawn uniformly."""
    best = int(np.argmax(scores))
    others = [i for i in range(len(scores)) if i != best]
    return best, int(rng.choice(others))


def random_pair(scores: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """Pick any two answers uniformly and put the higher score first."""
    a, b = (int(i) for i in rng.choice(len(scores), size=2, replace=False))
    return (a, b) if scores[a] >= scores[b] else (b, a)


STRATEGIES: dict[str, Callable[[np.ndarray, np.random.Generator], tuple[int, int]]] = {
    "best_worst": best_worst,
    "best_second": best_second,
    "best_random": best_random,
    "random": random_pair,
}


def _pair_of(
    record: Mapping, strategy: str, length_penalty: float, seed: int, iteration: int
) -> dict | str:
    """Return the pair of one prompt, or the reason why there is none."""
    texts, rewards = _checked(record)
    distinct = _distinct(texts)
    if len(distinct) < 2:
        return "identical" if len(texts) > 1 else "too_few"
    scores = penalised_rewards(
        [rewards[i] for i in distinct], [texts[i] for i in distinct], length_penalty
    )
    rng = _generator(seed, iteration, record["prompt_id"])
    better, worse = STRATEGIES[strategy](scores, rng)
    if scores[better] <= scores[worse]:
        return "tie"
    if not texts[distinct[better]].strip():
        return "empty"
    chosen, rejected = distinct[better], distinct[worse]
    return _as_pair(record, chosen, rejected, scores[better], scores[worse], iteration)


def _judged_pair_of(record: Mapping, judge: Judge, iteration: int) -> dict | str:
    """Return the pair that the judge picks for one prompt, or the reason why there is none."""
    texts, _ = _checked(record)
    distinct = _distinct(texts)
    if len(distinct) < 2:
        return "identical" if len(texts) > 1 else "too_few"
    context = list(record["messages"])
    best = distinct[knockout(judge, context, [texts[i] for i in distinct])["winner"]]
    others = [i for i in distinct if i != best]
    worst = others[knockout(_reversed(judge), context, [texts[i] for i in others])["winner"]]
    chance = float(judge([(context, texts[best], texts[worst])])[0])
    if chance <= 0.5:
        return "tie"
    if not texts[best].strip():
        return "empty"
    return _as_pair(record, best, worst, chance, 1 - chance, iteration)


def _reversed(judge: Judge) -> Judge:
    return lambda comparisons: 1 - np.asarray(judge(comparisons))


def _distinct(texts: Sequence[str]) -> list[int]:
    """The index of the first answer with each text."""
    first: dict[str, int] = {}
    for index, text in enumerate(texts):
        first.setdefault(text.strip(), index)
    return list(first.values())


def _as_pair(
    record: Mapping, chosen: int, rejected: int, high: float, low: float, iteration: int
) -> dict:
    responses, rewards = record["responses"], record["rewards"]
    prompt = list(record["messages"])
    carried = {key: value for key, value in record.items() if key not in _NOT_CARRIED}
    return {
        **carried,
        "chosen": [*prompt, {"role": "assistant", "content": responses[chosen]["text"]}],
        "rejected": [*prompt, {"role": "assistant", "content": responses[rejected]["text"]}],
        "chosen_score": float(high),
        "rejected_score": float(low),
        "chosen_reward": float(rewards[chosen]),
        "rejected_reward": float(rewards[rejected]),
        "margin": float(high - low),
        "iteration": iteration,
        # An answer cut by the token limit never chose to stop, so training must not add a stop.
        "chosen_finished": responses[chosen]["finish_reason"] != "length",
        "rejected_finished": responses[rejected]["finish_reason"] != "length",
    }


def _checked(record: Mapping) -> tuple[list[str], list[float]]:
    texts = [response["text"] for response in record["responses"]]
    rewards = record.get("rewards")
    if rewards is None or len(rewards) != len(texts):
        raise DataError(
            f"Prompt {record.get('prompt_id')!r} has {len(texts)} answers but "
            f"{0 if rewards is None else len(rewards)} rewards; annotate its generations again."
        )
    if not np.all(np.isfinite(np.asarray(rewards, dtype=float))):
        raise DataError(
            f"Prompt {record.get('prompt_id')!r} has a reward that is NaN or infinite; "
            "score in float32 and look at its answers."
        )
    return texts, list(rewards)


def _generator(seed: int, iteration: int, prompt_id: str) -> np.random.Generator:
    # Seeded by the prompt, not by its position: the draw survives reordering and sharding.
    digest = hashlib.sha256(f"{seed}/{iteration}/{prompt_id}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def _counts(prompts: int, pairs: list[dict], dropped: dict[str, int]) -> dict[str, float]:
    counts: dict[str, float] = {"prompts": prompts, "pairs": len(pairs)}
    counts |= {f"dropped_{reason}": number for reason, number in dropped.items()}
    counts["chosen_cut"] = sum(not pair["chosen_finished"] for pair in pairs)
    counts["rejected_cut"] = sum(not pair["rejected_finished"] for pair in pairs)
    if pairs:
        counts["margin"] = float(np.mean([pair["margin"] for pair in pairs]))
        for side in ("chosen", "rejected"):
            lengths = [len(pair[side][-1]["content"]) for pair in pairs]
            counts[f"{side}_characters"] = float(np.mean(lengths))
    return counts
