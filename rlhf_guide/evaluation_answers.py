"""Every policy's answers to the evaluation prompts: drawn once, scored once, read ever after.

    rows = evaluation_answers(ws, settings, "sft")  # draws and scores them, or reads them

The chapter that trains a policy also draws its answers; chapter 08 reads them all. Each policy's
answers are a stage of their own, so that a new policy or another number of samples redoes only what
it changes. Before any of them is believed, `refuse_overlap` compares the prompts with everything
that was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data_prep.contamination import EvaluationIndex
from data_prep.ngrams import prompt_text
from rlhf_guide.annotation import annotate
from rlhf_guide.batching import sample_rows
from rlhf_guide.errors import DataError, ParameterError
from rlhf_guide.generation import answer_config, generate
from rlhf_guide.models import choose_device
from rlhf_guide.online_report import response_summary
from rlhf_guide.online_stages import Scorer, lazy_scorer
from rlhf_guide.parameters import nearest
from rlhf_guide.policies import Policy, chosen_policy, offline_policy, sft_policy
from rlhf_guide.profiles import Profile
from rlhf_guide.workspace import Workspace, read_jsonl

Row = dict[str, Any]

# Each policy that is evaluated: the stage that decides which weights it has, and where they lie.
POLICIES: dict[str, tuple[str, Callable[[Workspace], Policy]]] = {
    "sft": ("sft", sft_policy),
    "offline_dpo": ("offline_dpo", offline_policy),
    "online_dpo": ("online", chosen_policy),
}
EVALUATION_FILE = "prompts_evaluation"
# Words in a row that make two prompts the same one. The miniature's format instructions have up to
# eleven words and end many prompts, so 13 words may agree there though the questions differ.
COMMON_WORDS, COMMON_WORDS_WITH_INSTRUCTION = 13, 16


def evaluation_prompts(ws: Workspace, settings: Profile) -> list[Row]:
    """Return the evaluation prompts of this profile: the same ones for every policy."""
    stored = read_jsonl(ws.load("data").dir / f"{EVALUATION_FILE}.jsonl")
    return sample_rows(stored, settings.evaluation.prompts, settings.seed)


def evaluation_answers(
    ws: Workspace, settings: Profile, name: str, scorer: Scorer | None = None
) -> list[Row]:
    """Return a policy's answers to the evaluation prompts with their rewards, in prompt order.

    ``name`` is one of `POLICIES`. Answers that the run folder holds for the same policy, reward
    model and settings are read; otherwise they are drawn and scored now. All policies get the same
    seeds. ``scorer`` comes from `lazy_scorer` and saves loading the reward model again. Raises
    ParameterError for an unknown name and MissingStage before the policy is trained.
    """
    if name not in POLICIES:
        raise ParameterError(
            f"unknown policy {name!r}; the policies are {', '.join(POLICIES)}."
            + nearest(name, POLICIES)
        )
    made_by, policy = POLICIES[name]
    part = settings.evaluation
    config = {
        **answer_config(settings.generation),
        "prompts": part.prompts,
        "temperatures": [part.temperature] * part.samples_per_prompt,
        "seed": settings.seed,
        "reward_max_length": settings.reward_model.max_length,
    }
    stage = ws.stage(answers_stage(name), config, ["data", made_by, "reward_model"])
    file = stage.dir / "annotated.jsonl"
    if not stage.done:
        model, adapter = policy(ws)
        rows = generate(
            model,
            evaluation_prompts(ws, settings),
            settings.generation,
            config["temperatures"],
            settings.seed,
            stage.dir / "generations.jsonl",
            choose_device(settings.dtype)[1],
            adapter=adapter,
        )
        annotate(rows, (scorer or lazy_scorer(ws, settings))(), file)
        stage.finish(response_summary(rows))
    return read_jsonl(file)


def answers_stage(name: str) -> str:
    """Name the stage that holds a policy's evaluation answers."""
    return f"evaluation_answers_{name}"


def other_tables(ws: Workspace) -> dict[str, list[Row]]:
    """Return every table of the data stage but the evaluation prompts, by name.

    These are what the policies and the judges were trained, tuned or chosen on.
    """
    files = sorted(ws.load("data").dir.glob("*.jsonl"))
    return {file.stem: read_jsonl(file) for file in files if file.stem != EVALUATION_FILE}


def refuse_overlap(prompts: Sequence[Row], tables: Mapping[str, Sequence[Row]]) -> int:
    """Compare evaluation prompts with the rows of ``tables``; return how many rows were compared.

    Raises DataError with the list of evaluation prompts that have a row with the same id, or with
    the same words by the rule that cleans the prompt set (`data_prep.contamination`: 13 words in a
    row, 16 where prompts end with a format instruction, or the whole prompt where it is shorter).
    Their scores would measure memory. A paraphrase is not seen.
    """
    found = overlaps(prompts, tables)
    if found:
        listed = "; ".join(
            f"{row['prompt_id']} and {row['other']} in {row['table']} ({row['why']})"
            for row in found
        )
        raise DataError(
            f"{len({row['prompt_id'] for row in found})} of {len(prompts)} evaluation prompts "
            f"overlap with data that the models have seen: {listed}. Take them out of one side, "
            "then run the data notebook (01) and what follows again."
        )
    return sum(len(rows) for rows in tables.values())


def overlaps(prompts: Sequence[Row], tables: Mapping[str, Sequence[Row]]) -> list[Row]:
    """List the evaluation prompts that also stand in a table, each (prompt, row) once.

    A row holds ``prompt_id``, ``table``, ``other`` (the id there) and ``why``.
    """
    instructed = any(prompt.get("instruction") for prompt in prompts)
    index = EvaluationIndex(prompts, COMMON_WORDS_WITH_INSTRUCTION if instructed else COMMON_WORDS)
    ids = {prompt["prompt_id"] for prompt in prompts}
    found: dict[tuple[str, str, str], str] = {}
    for table, rows in tables.items():
        for row in rows:
            name = row.get("prompt_id") or row["id"]
            if name in ids:
                found.setdefault((name, table, name), "same id")
            elif match := index.contaminated(_prompt_text(row)):
                found.setdefault((match, table, name), "same words")
    return [
        {"prompt_id": prompt_id, "table": table, "other": other, "why": why}
        for (prompt_id, table, other), why in found.items()
    ]


def _prompt_text(row: Row) -> str:
    """What a row asks: its conversation up to the last answer."""
    messages = row.get("messages") or row["chosen"]
    return prompt_text(messages[:-1] if messages[-1]["role"] == "assistant" else messages)
