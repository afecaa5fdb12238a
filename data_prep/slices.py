"""The prompt set dealt for a course: slices to train on, and prompts held out from everything.

`prompt_set` deals the online slices and one slice more; here that one becomes validation and
evaluation prompts, and whatever overlaps with the latter leaves the others.
"""

from collections.abc import Sequence

from data_prep import embedded
from data_prep.contamination import EvaluationIndex
from data_prep.prompt_set import PromptSet, build_prompt_set, without_overlap
from data_prep.schema import Prompt
from data_prep.source import Drop

HELD_OUT = 1500  # prompts for validation and evaluation, of a set that is large enough
HELD_OUT_SHARE = 0.25  # of a smaller set


def prompt_slices(records: Sequence[Prompt], drop: Drop, seed: int = 0) -> PromptSet:
    """Slices `online_1` to `online_3`, `validation` and, twice as large, `evaluation`.

    Disjoint and free of near-duplicates as `build_prompt_set` makes them, of the embedded
    evaluation prompts, and of 13-word runs in common with the new evaluation slice. Raises
    DataError when too few prompts are left.
    """
    held_out = min(HELD_OUT, int(HELD_OUT_SHARE * len(records)))
    published = embedded.load_prompts("evaluation")
    dealt = build_prompt_set(records, published, drop, validation=held_out, seed=seed)
    third = held_out // 3
    held = dealt.pop("validation")
    evaluation = held[third:]
    index = EvaluationIndex(evaluation)
    training = {**dealt, "validation": held[:third]}
    clean = {name: without_overlap(rows, index, drop) for name, rows in training.items()}
    return {**clean, "evaluation": evaluation}
