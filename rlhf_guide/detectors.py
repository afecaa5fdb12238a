"""Detectors: one small function for each way in which an RLHF run goes wrong unnoticed.

Each takes what a run has at hand (token ids, rewards, losses, divergences), measures one number and
compares it with a limit that follows from a definition, from chance or from a theorem; none was
fitted to a run. Numbers go in, so no model is loaded here. Every detector raises DataError when it
is given nothing to measure: silence is no pass.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_guide.errors import DataError

LN2 = math.log(2)  # the Bradley-Terry and DPO loss of a model that prefers nothing
ONE_SIDED_95 = 1.645  # standard errors
SURE = 3.0  # standard errors: a false alarm in 740
ROUNDING = float(np.sqrt(np.finfo(np.float32).eps))  # half of float32's digits


@dataclass(frozen=True)
class Finding:
    """What a detector says: `fired` when `value` lies on the wrong side of `limit`."""

    name: str
    fired: bool
    value: float
    limit: float
    diagnosis: str
    remedy: str


def no_end_token(labels: Sequence[Sequence[int]], end_id: int) -> Finding:
    """Share of conversations whose last token is not a learnt end of turn; limit 0.

    `labels` as the trainer gets them: -100 where a token is not learnt. With padding equal to the
    end token the collator masks exactly this label.
    """
    value = _share([not row or row[-1] != end_id for row in labels], "rows of labels")
    return Finding(
        "no end token",
        value > 0,
        value,
        0.0,
        "The end of a turn is never learnt, so answers run to the length limit.",
        "Give padding a token of its own and keep the label of every end of turn.",
    )


def doubled_bos(ids: Sequence[Sequence[int]], bos_id: int) -> Finding:
    """Share of token sequences that begin with the BOS twice; limit 0."""
    value = _share([list(row[:2]) == [bos_id, bos_id] for row in ids], "token sequences")
    return Finding(
        "doubled BOS",
        value > 0,
        value,
        0.0,
        "Templated text was tokenised a second time, with special tokens.",
        "Pass messages between stages and tokenise once, with `chat.encode_prompt`.",
    )


def contaminated_packing(packed: Sequence[float], alone: Sequence[float]) -> Finding:
    """Largest change, in nats a token, of a conversation's loss when it is packed.

    Both losses come from one model in float32; they may differ by `ROUNDING`.
    """
    _require(packed, "losses")
    if len(packed) != len(alone):
        raise DataError(f"{len(packed)} packed and {len(alone)} single losses: give one of each.")
    value = float(np.abs(np.subtract(packed, alone)).max())
    return Finding(
        "contaminated packing",
        value > ROUNDING,
        value,
        ROUNDING,
        "Conversations in one block read each other.",
        "Restart positions at every conversation and pass no attention mask, as TRL does.",
    )


def truncated_pairs(
    chosen: Sequence[Sequence[int]], rejected: Sequence[Sequence[int]], limit: float = 0.01
) -> Finding:
    """Share of pairs whose two token sequences are equal after the cut.

    The limit is the one at which `reward_model.encode_pairs` refuses to train.
    """
    value = _share([list(a) == list(b) for a, b in zip(chosen, rejected, strict=True)], "pairs")
    return Finding(
        "truncated pairs",
        value > limit,
        value,
        limit,
        "The cut took the answers away, so the two sides of a pair are one text.",
        "Cut on the left, and raise the maximum length.",
    )


def swapped_labels(better: Sequence[float], worse: Sequence[float]) -> Finding:
    """Accuracy of rewards on pairs whose order is trusted; fires below what guessing can reach.

    `better[i]` and `worse[i]` are the rewards of one pair; a tie counts one half. The limit is the
    lower end of chance: ½ − 1.645 √(¼ / pairs).
    """
    value, limit = _accuracy(better, worse), 0.5 - _chance(len(better))
    return Finding(
        "swapped labels",
        value < limit,
        value,
        limit,
        "The model prefers what people reject; its training loss looks as good as ever.",
        "Read a few pairs, and turn the columns round.",
    )


def noisy_reward_model(better: Sequence[float], worse: Sequence[float]) -> Finding:
    """Accuracy of rewards on pairs whose order is trusted; fires when guessing could reach it.

    Arguments as in `swapped_labels`. The limit is the upper end of chance: ½ + 1.645 √(¼ / pairs).
    """
    value, limit = _accuracy(better, worse), 0.5 + _chance(len(better))
    return Finding(
        "noisy reward model",
        value < limit,
        value,
        limit,
        "The reward does not rank answers, so the best of n is the best by luck.",
        "Measure how often two annotators agree, and train on more or cleaner pairs.",
    )


def length_hack(
    better: Sequence[float],
    worse: Sequence[float],
    better_words: Sequence[int],
    worse_words: Sequence[int],
) -> Finding:
    """Share of the pairs with a *shorter* better answer in which the reward takes the longer.

    Rewards as in `swapped_labels`. The limit is the upper end of chance: ½ + 1.645 √(¼ / pairs).
    Raises DataError when in no pair the better answer is the shorter.
    """
    shorter = np.less(better_words, worse_words)
    kept = [np.asarray(rewards, dtype=float)[shorter] for rewards in (better, worse)]
    value, limit = 1 - _accuracy(*kept), 0.5 + _chance(int(shorter.sum()))
    return Finding(
        "length hack",
        value > limit,
        value,
        limit,
        "The reward pays for words, and best-of-n buys them.",
        "Penalise length (Eq. 9), or balance lengths in the preference data.",
    )


def learning_rate_too_high(losses: Sequence[float]) -> Finding:
    """Mean DPO loss, in nats, over the last epoch; the limit is ln 2, the loss of no step at all.

    The pairs have been seen before, so a run that learns anything ends below it.
    """
    _require(losses, "losses")
    value = float(np.mean(losses))
    return Finding(
        "learning rate too high",
        not value <= LN2,  # a loss that is not a number fires, too
        value,
        LN2,
        "Steps overshoot: the policy is worse than the one it started from.",
        "Lower the learning rate tenfold, and keep the warm-up.",
    )


def beta_too_small(divergence: float, budget: float) -> Finding:
    """KL(π ‖ π0), in nats, against the `budget` that was set before the run."""
    return Finding(
        "β too small",
        divergence > budget,
        divergence,
        budget,
        "The leash is too long: the policy follows the errors of its reward far from π0.",
        "Raise β, or choose an earlier checkpoint on validation prompts.",
    )


def moving_reference(divergence: float, gain: float, beta: float) -> Finding:
    """β KL(π ‖ π0) as a multiple of what it bought: the `gain` of π over π0 in the fitted reward.

    The optimum of Eq. 2 for that reward scores no less than π0 does, so gain − β KL ≥ 0 and the
    ratio is at most 1. Divergence in nats, gain in units of the reward.
    """
    value = beta * divergence / gain if gain > 0 else math.inf * (divergence > 0)
    return Finding(
        "moving reference",
        value > 1,
        value,
        1.0,
        "Each round is tied to the last policy only, so the rounds' steps away from π0 add up.",
        "Keep π0 as the reference of every round: `online_reference` stays `sft`.",
    )


def stale_data(stored: Sequence[float], fresh: Sequence[float]) -> Finding:
    """Difference between the rewards of fresh answers and of those in the pairs, standard errors.

    `stored` are rewards of the answers that the next update is to learn from, `fresh` those of
    answers drawn now from the policy to be updated. On-policy both have one distribution.
    """
    for rewards in (stored, fresh):
        _require(rewards, "rewards")
    error = math.hypot(*(float(np.std(r)) / math.sqrt(len(r)) for r in (stored, fresh)))
    if error == 0:
        raise DataError("all rewards are equal: draw more answers, or look at the reward model.")
    value = float(abs(np.mean(fresh) - np.mean(stored)) / error)
    return Finding(
        "stale data",
        value > SURE,
        value,
        SURE,
        "The pairs hold answers that the policy no longer gives.",
        "Sample new answers from the current policy in every iteration.",
    )


def leaked_prompts(overlaps: Sequence[Mapping], prompts: Sequence[Mapping]) -> Finding:
    """Share of evaluation prompts that stand in a training table; limit 0.

    `overlaps` come from `evaluation_answers.overlaps`.
    """
    found = {row["prompt_id"] for row in overlaps}
    value = _share([row["prompt_id"] in found for row in prompts], "evaluation prompts")
    return Finding(
        "leaked evaluation prompts",
        value > 0,
        value,
        0.0,
        "Scores on these prompts measure memory.",
        "Take the prompts out of one side, and train again.",
    )


def _require(values: Sequence, what: str) -> None:
    if len(values) == 0:
        raise DataError(f"the detector got no {what}: check the run's folder and try again.")


def _share(flags: Sequence, what: str) -> float:
    _require(flags, what)
    return float(np.mean(flags))


def _accuracy(better: Sequence[float], worse: Sequence[float]) -> float:
    """Share of pairs in which the better answer has the larger reward; a tie is one half."""
    margins = np.subtract(better, worse)
    return _share((margins > 0) + 0.5 * (margins == 0), "pairs")


def _chance(pairs: int) -> float:
    """How far from ½ guessing gets in one of twenty tries, on either side."""
    return ONE_SIDED_95 * math.sqrt(0.25 / pairs)
