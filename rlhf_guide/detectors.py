"""Detectors: one small function for each way in which an RLHF run goes wrong unnoticed.

Each takes what the run has at hand (token ids, rewards, losses, divergences), measures one number
and compares it with a threshold. They read numbers only, so they need no model and no trainer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_guide.errors import DataError


@dataclass(frozen=True)
class Finding:
    """What a detector says: `fired` when `value` lies on the wrong side of `threshold`."""

    name: str
    fired: bool
    value: float
    threshold: float
    diagnosis: str
    remedy: str


def no_end_token(labels: Sequence[Sequence[int]], end_id: int, threshold: float = 0.01) -> Finding:
    """Share of tokenised conversations whose last token is not a learnt end of turn.

    `labels` as the trainer gets them: -100 where a token is not learnt. With padding equal to the
    end token the collator masks exactly this label.
    """
    value = _share([not row or row[-1] != end_id for row in labels], "label rows")
    return Finding(
        "no end token",
        value > threshold,
        value,
        threshold,
        "The end of a turn is never learnt, so answers run to the length limit.",
        "Give padding a token of its own and keep the label of every end of turn.",
    )


def doubled_bos(ids: Sequence[Sequence[int]], bos_id: int, threshold: float = 0.0) -> Finding:
    """Share of token sequences that begin with the BOS twice."""
    value = _share([list(row[:2]) == [bos_id, bos_id] for row in ids], "token sequences")
    return Finding(
        "doubled BOS",
        value > threshold,
        value,
        threshold,
        "Templated text was tokenised again with special tokens.",
        "Pass messages between stages and tokenise once, with `chat.encode_prompt`.",
    )


def swapped_labels(
    better: Sequence[float], worse: Sequence[float], threshold: float = 0.5
) -> Finding:
    """Accuracy of rewards on pairs whose order is trusted; below one half the labels are swapped.

    `better[i]` and `worse[i]` are rewards of one pair; a tie counts one half.
    """
    margins = np.subtract(better, worse)
    value = _share((margins > 0) + 0.5 * (margins == 0), "pairs")
    return Finding(
        "swapped labels",
        value < threshold,
        value,
        threshold,
        "The model prefers what people reject; its training loss looks as good as ever.",
        "Compare the columns with a few pairs read by hand, and turn the labels round.",
    )


def truncated_pairs(
    chosen: Sequence[Sequence[int]], rejected: Sequence[Sequence[int]], threshold: float = 0.01
) -> Finding:
    """Share of pairs whose two token sequences are equal after truncation."""
    value = _share([list(a) == list(b) for a, b in zip(chosen, rejected, strict=True)], "pairs")
    return Finding(
        "truncated pairs",
        value > threshold,
        value,
        threshold,
        "The cut took the answers away, so the two sides of a pair are one text.",
        "Cut on the left, and raise the maximum length.",
    )


def contaminated_packing(
    packed: Sequence[float], alone: Sequence[float], threshold: float = 1e-3
) -> Finding:
    """Largest difference, in nats a token, of a conversation's loss packed and alone (float32)."""
    if len(packed) != len(alone) or not len(packed):
        raise DataError(f"{len(packed)} packed and {len(alone)} single losses: give one of each.")
    value = float(np.abs(np.subtract(packed, alone)).max())
    return Finding(
        "contaminated packing",
        value > threshold,
        value,
        threshold,
        "Conversations in one block read each other.",
        "Restart positions at every conversation and pass no attention mask, as TRL does.",
    )


def beta_too_small(divergences: Sequence[float], budget: float) -> Finding:
    """Last KL(π ‖ π0), in nats, against the `budget` that the run may spend."""
    _require(divergences, "divergences")
    value = float(divergences[-1])
    return Finding(
        "β too small",
        value > budget,
        value,
        budget,
        "The leash is too long: the policy follows the errors of its reward far from π0.",
        "Raise β, or choose an earlier checkpoint on validation prompts.",
    )


def learning_rate_too_high(losses: Sequence[float], threshold: float = 1.5) -> Finding:
    """Mean loss of the last half of a run as a multiple of its first loss."""
    _require(losses, "losses")
    tail = losses[len(losses) // 2 :]
    value = float(np.mean(tail) / losses[0])
    return Finding(
        "learning rate too high",
        not value <= threshold,  # a loss of NaN fires, too
        value,
        threshold,
        "Steps overshoot: the loss ends far above where it began.",
        "Lower the learning rate tenfold, and keep the warm-up.",
    )


def moving_reference(divergences: Sequence[float], threshold: float = 1.25) -> Finding:
    """Growth of KL(π_t ‖ π0) over the second half of the rounds; a fixed reference bounds it."""
    _require(divergences, "divergences")
    middle = float(divergences[len(divergences) // 2])
    value = float(divergences[-1]) / middle if middle > 0 else float("inf")
    return Finding(
        "moving reference",
        value > threshold,
        value,
        threshold,
        "Each round is tied to the last policy only, so the rounds' tilts add up.",
        'Keep π0 as the reference of every round: online_reference="sft".',
    )


def length_hack(
    rewards: Sequence[Sequence[float]], lengths: Sequence[Sequence[float]], threshold: float = 0.5
) -> Finding:
    """Correlation of reward with length among the answers to one prompt, all prompts pooled."""
    value = _within_prompts(rewards, lengths)
    return Finding(
        "length hack",
        value > threshold,
        value,
        threshold,
        "The reward pays for words, and best-of-n buys them.",
        "Penalise length (Eq. 9), or balance lengths in the preference data.",
    )


def noisy_reward_model(
    rewards: Sequence[Sequence[float]], trusted: Sequence[Sequence[float]], threshold: float = 0.5
) -> Finding:
    """Correlation of reward with trusted scores among the answers to one prompt, pooled.

    The trusted scores are the oracle's here; on real data use a stronger judge on a sample.
    """
    value = _within_prompts(rewards, trusted)
    return Finding(
        "noisy reward model",
        value < threshold,
        value,
        threshold,
        "The reward hardly ranks answers, so the best of n is best by luck.",
        "Train on more or cleaner pairs, and average several reward models.",
    )


def stale_data(divergences: Sequence[float], threshold: float = 0.5) -> Finding:
    """Largest KL, in nats, of the trained policy from the one that its pairs were sampled from."""
    _require(divergences, "divergences")
    value = float(max(divergences))
    return Finding(
        "stale data",
        value > threshold,
        value,
        threshold,
        "The policy has left the answers that it is trained on.",
        "Sample new answers from the current policy in every iteration.",
    )


def leaked_prompts(
    overlaps: Sequence[Mapping], prompts: Sequence[Mapping], threshold: float = 0.0
) -> Finding:
    """Share of evaluation prompts that stand in training data (`evaluation_answers.overlaps`)."""
    found = {row["prompt_id"] for row in overlaps}
    value = _share([row["prompt_id"] in found for row in prompts], "evaluation prompts")
    return Finding(
        "leaked evaluation prompts",
        value > threshold,
        value,
        threshold,
        "Scores on these prompts measure memory.",
        "Take the prompts out of one side, and train again.",
    )


def _require(values: Sequence, what: str) -> None:
    """Raise DataError for an empty sequence: nothing measured is no pass."""
    if len(values) == 0:
        raise DataError(f"the detector got no {what}: check the run's folder and try again.")


def _share(flags: Sequence, what: str) -> float:
    """Mean of flags."""
    _require(flags, what)
    return float(np.mean(flags))


def _within_prompts(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> float:
    """Pearson correlation of deviations from each prompt's mean, pooled over prompts.

    Raises DataError when one side does not vary within any prompt.
    """
    _require(a, "prompts")
    x, y = (np.concatenate([np.asarray(row) - np.mean(row) for row in side]) for side in (a, b))
    if len(x) != len(y) or not (x @ x and y @ y):
        raise DataError(
            "rewards and scores must be aligned and differ among the answers to a prompt: draw "
            "more answers a prompt, or look at the scores."
        )
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))
