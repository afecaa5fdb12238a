"""The prompt set of online RLHF: checked, de-duplicated, free of evaluation prompts, and sliced.

The paper filters and de-duplicates prompts of six sources and deals them to its iterations
(appendix A and section 4); its copy on the Hub has 179,465 rows. How this was done is not
published. Here, in this order: every conversation ends on a user turn; exact and near-duplicates
go (`dedup`); what overlaps with evaluation prompts goes (`contamination`); the rest is shuffled by
a seeded hash and dealt to disjoint slices.
"""

import hashlib
from collections.abc import Iterable

from data_prep.contamination import EvaluationIndex
from data_prep.dedup import deduplicate
from data_prep.filters import check_prompt
from data_prep.ngrams import prompt_text
from data_prep.schema import DataError, Prompt
from data_prep.source import Drop, Rejected

PromptSet = dict[str, list[Prompt]]


def build_prompt_set(
    records: Iterable[Prompt],
    evaluation_prompts: Iterable[Prompt],
    drop: Drop,
    iterations: int = 3,
    validation: int = 1000,
    threshold: float = 0.8,
    n: int = 13,
    seed: int = 0,
) -> PromptSet:
    """Slices `online_1` to `online_<iterations>`, equally large but for one, and `validation`.

    `drop(reason, record)` receives every record that is turned away: `role_order`, `no_user_turn`,
    `empty_turn`, `duplicate`, `near_duplicate` or `contaminated`. `threshold` is the Jaccard
    similarity of near-duplicates, `n` the run of words that counts as an overlap. Each slice is in
    random order, so its first k prompts are a fair sample. Raises DataError if fewer prompts are
    left than the validation slice and one for each iteration need.
    """
    prompts = _well_formed(records, drop)
    prompts = _unique(prompts, drop, threshold)
    prompts = without_overlap(prompts, EvaluationIndex(evaluation_prompts, n), drop)
    return _deal(_shuffled(prompts, seed), iterations, validation)


def without_overlap(prompts: Iterable[Prompt], index: EvaluationIndex, drop: Drop) -> list[Prompt]:
    """The prompts that share no run of words with an evaluation prompt; the others are dropped."""
    clean = []
    for prompt in prompts:
        found = index.contaminated(prompt_text(prompt["messages"]))
        if found is None:
            clean.append(prompt)
        else:
            drop("contaminated", {**prompt, "repeats": found})
    return clean


def _well_formed(records: Iterable[Prompt], drop: Drop) -> list[Prompt]:
    prompts = []
    for record in records:
        try:
            check_prompt(record["messages"])
            prompts.append(record)
        except Rejected as rejected:
            drop(rejected.reason, record)
    return prompts


def _unique(prompts: list[Prompt], drop: Drop, threshold: float) -> list[Prompt]:
    texts = [prompt_text(prompt["messages"]) for prompt in prompts]
    kept, removed = deduplicate(texts, threshold)
    for index, (original, reason) in removed.items():
        drop(reason, {**prompts[index], "repeats": prompts[original]["prompt_id"]})
    return [prompts[index] for index in kept]


def _shuffled(prompts: list[Prompt], seed: int) -> list[Prompt]:
    """In the order of a seeded hash of the ids: one more prompt does not move the others."""

    def key(prompt: Prompt) -> bytes:
        return hashlib.sha256(f"{seed}|{prompt['prompt_id']}".encode()).digest()

    return sorted(prompts, key=key)


def _deal(prompts: list[Prompt], iterations: int, validation: int) -> PromptSet:
    if len(prompts) < validation + iterations:
        raise DataError(
            f"{len(prompts)} prompts are left, too few for {validation} validation prompts and "
            f"{iterations} iterations: lower `validation`, or add raw data."
        )
    rest = prompts[validation:]
    slices = {f"online_{i + 1}": rest[i::iterations] for i in range(iterations)}
    return {**slices, "validation": prompts[:validation]}
