"""The failure gallery (chapter 11): each failure broken on purpose, beside its healthy twin.

A case is a function of the run's workspace. It does one thing twice, once as the course does it
and once with one thing broken, and returns curves and what the detector says of either. Cases that
train are in `gallery_training`, the others in `gallery_measured`.
"""

from collections.abc import Callable
from typing import Any

from rlhf_guide.gallery_case import Case
from rlhf_guide.gallery_measured import (
    beta_too_small,
    contaminated_packing,
    doubled_bos,
    leaked_prompts,
    moving_reference,
    stale_data,
    truncated_pairs,
)
from rlhf_guide.gallery_training import (
    learning_rate_too_high,
    length_hack,
    no_end_token,
    noisy_reward_model,
    swapped_labels,
)
from rlhf_guide.workspace import Workspace


def run_case(ws: Workspace, name: str) -> Case:
    """The case of a name in `CASES`, run now. Raises KeyError for an unknown name."""
    return CASES[name][0](ws)


def index_row(name: str, case: Case) -> dict[str, Any]:
    """One row of the gallery's index: the failure, its diagnosis, the values and the chapter."""
    return {
        "failure": name,
        "diagnosis": case.broken.diagnosis,
        "healthy": case.healthy.value,
        "broken": case.broken.value,
        "limit": case.broken.limit,
        "chapter": CASES[name][1],
    }


CASES: dict[str, tuple[Callable[[Workspace], Case], str]] = {
    "no end token": (no_end_token, "02_sft_with_packing"),
    "doubled BOS": (doubled_bos, "02_sft_with_packing"),
    "contaminated packing": (contaminated_packing, "02_sft_with_packing"),
    "truncated pairs": (truncated_pairs, "03_reward_model"),
    "swapped labels": (swapped_labels, "03_reward_model"),
    "noisy reward model": (noisy_reward_model, "05_what_rewards_measure"),
    "length hack": (length_hack, "05_what_rewards_measure"),
    "learning rate too high": (learning_rate_too_high, "06_offline_dpo"),
    "β too small": (beta_too_small, "06_offline_dpo"),
    "moving reference": (moving_reference, "09_theory"),
    "stale data": (stale_data, "07_online_dpo"),
    "leaked evaluation prompts": (leaked_prompts, "08_evaluation"),
}
