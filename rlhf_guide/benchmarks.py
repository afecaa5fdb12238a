"""Benchmarks of ability with lm-eval: what does preference training cost elsewhere?

    rows = run_benchmarks(model, tokenizer, COURSE_TASKS, limit=104)
    rows = run_benchmarks(model, tokenizer, PAPER_TASKS, allow_download=True)
    alignment_tax(before_rows, after_rows)

`PAPER_TASKS` are the paper's six academic tasks with the shots of its Table 6. Their questions come
from the Hub, so they need permission to download; two of them run code that the model wrote and
stay off unless asked for. `COURSE_TASKS` are two tasks of the same kinds, made from the
miniature's evaluation prompts: they need no network and take the same path through lm-eval.

This is the only module that touches lm-eval, which is an optional part of the course.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_guide.errors import DownloadRefused, GuideError, ParameterError
from rlhf_guide.evaluation import bootstrap_mean, paired_difference
from rlhf_guide.parameters import nearest
from rlhf_guide.profiles import DOWNLOAD_VARIABLE

Row = dict[str, Any]

CODE_VARIABLE = "HF_ALLOW_CODE_EVAL"  # lm-eval's code tasks refuse to run while it is not "1"
NOT_INSTALLED = (
    "The benchmarks need lm-eval, which is not installed: "
    "pip install -c constraints.txt -e '.[evaluation]'"
)
CHOICES = 4  # answers to choose from in `course_facts`
LONGEST_ANSWER = 48  # new tokens in `course_answers`


@dataclass(frozen=True)
class Benchmark:
    """One lm-eval task or group: what is asked, and which of its numbers counts.

    name: as lm-eval knows it. metric, filter: the number of each item, and the filter that read it
    from the model's text. shots: solved examples before each question. runs_code: whether it runs
    what the model wrote. config: makes lm-eval's configuration of a task that it does not know.
    """

    name: str
    metric: str
    shots: int
    filter: str = "none"
    runs_code: bool = False
    config: Callable[[], dict[str, Any]] | None = None


# Tasks and shots are the paper's (Table 6). It does not name the variants: these are lm-eval's
# usual ones, so a score may differ from the paper's by more than chance.
PAPER_TASKS = (
    Benchmark("gsm8k", "exact_match", shots=8, filter="strict-match"),
    Benchmark("mmlu", "acc", shots=5),
    Benchmark("humaneval", "pass@1", shots=0, filter="create_test", runs_code=True),
    Benchmark("truthfulqa_mc2", "acc", shots=0),
    Benchmark("arc_challenge", "acc_norm", shots=25),
    Benchmark("mbpp", "pass_at_1", shots=0, runs_code=True),
)


def facts_task() -> dict[str, Any]:
    """Multiple choice by likelihood, as MMLU and ARC: which short answer belongs to the question?

    The wrong answers are the right ones of other questions of the same section, and the format
    instruction is left out, so nothing but the content tells them apart. Chance is 1 in `CHOICES`.
    """
    return {
        "task": "course_facts",
        **_documents(_facts_document),
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [_mean_of("acc_norm")],
    }


def answers_task() -> dict[str, Any]:
    """Free answers, as GSM8K: the share of the key facts that a greedy answer names.

    Only the section with computed answers and reasons is asked, without format instructions.
    """
    return {
        "task": "course_answers",
        **_documents(_answers_document, section="reasoning"),
        "output_type": "generate_until",
        "doc_to_target": "reference",
        "generation_kwargs": {
            "until": ["\n\n"],
            "max_gen_toks": LONGEST_ANSWER,
            "do_sample": False,
        },
        "process_results": _facts_named,
        "metric_list": [_mean_of("facts")],
    }


COURSE_TASKS = (
    Benchmark("course_facts", "acc_norm", shots=0, config=facts_task),
    Benchmark("course_answers", "facts", shots=0, config=answers_task),
)


def installed() -> bool:
    """Whether lm-eval can be imported."""
    return importlib.util.find_spec("lm_eval") is not None


def run_benchmarks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Benchmark | str] = PAPER_TASKS,
    limit: int | None = None,
    allow_code_execution: bool = False,
    allow_download: bool = False,
    chat_template: bool = False,
    batch_size: int = 32,
    n_boot: int = 2000,
    seed: int = 0,
    progress: bool = True,
) -> list[Row]:
    """Evaluate a loaded model with lm-eval; return one row a task.

    A row holds ``task, metric, value, low, high, n, shots`` and ``scores``, one number an item in
    the task's order; the 95% interval redraws items. ``limit`` takes the first items of each task
    (of each subject of MMLU). A task is a `Benchmark` or the name of one of `PAPER_TASKS` and
    `COURSE_TASKS`; any other of lm-eval's tasks is a `Benchmark` of your own. With
    ``chat_template`` a question is a user's turn. ``progress`` shows lm-eval's bars; without it
    nothing is written meanwhile.

    Tasks that run the model's code are left out, and named, unless ``allow_code_execution``: they
    run untrusted programs with your rights, so do that in a container without a network only.
    Raises ParameterError for an unknown task or metric, with the nearest name, DownloadRefused for
    tasks of the Hub without ``allow_download`` (or RLHF_GUIDE_ALLOW_DOWNLOAD), and GuideError where
    lm-eval is missing.
    """
    asked = [_known(task) for task in tasks]
    _refuse_downloads(asked, allow_download)
    if not installed():
        raise GuideError(NOT_INSTALLED)
    chosen = _without_code(asked, allow_code_execution)
    with _quiet(progress), _code_allowed(any(task.runs_code for task in chosen)):
        from lm_eval.models.huggingface import HFLM

        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        manager, rows = _manager(chosen), []
        for task in chosen:
            scores = _scores(lm, manager, task, limit, chat_template, seed)
            rows.append(
                {
                    "task": task.name,
                    "metric": task.metric,
                    **bootstrap_mean(scores, None, n_boot, seed),
                    "shots": task.shots,
                    "scores": scores,
                }
            )
    return rows


def alignment_tax(
    before: Sequence[Row], after: Sequence[Row], n_boot: int = 2000, seed: int = 0
) -> list[Row]:
    """Return what training changed on each task: both scores and their paired difference.

    ``before`` and ``after`` come from `run_benchmarks` with the same tasks and limit; item i of
    both is the same question. A row holds ``task, metric, before, after`` and ``difference``
    (after − before), the last three as intervals. Raises ParameterError for other tasks or items.
    """
    asked = [{row["task"]: len(row["scores"]) for row in rows} for rows in (before, after)]
    if asked[0] != asked[1]:
        raise ParameterError(
            f"items by task {asked[0]} cannot be compared with {asked[1]}: run both policies on "
            "the same tasks with the same limit."
        )
    return [
        {
            "task": old["task"],
            "metric": old["metric"],
            "before": interval(old),
            "after": interval(new),
            "difference": paired_difference(new["scores"], old["scores"], None, n_boot, seed),
        }
        for old, new in zip(before, after, strict=True)
    ]


def interval(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the interval of a row of `run_benchmarks`."""
    return {key: row[key] for key in ("value", "low", "high", "n")}


def _known(task: Benchmark | str) -> Benchmark:
    if isinstance(task, Benchmark):
        return task
    known = {listed.name: listed for listed in (*PAPER_TASKS, *COURSE_TASKS)}
    if task not in known:
        raise ParameterError(
            f"unknown task {task!r}; the course names {', '.join(known)}.{nearest(task, known)} "
            "For another task of lm-eval give Benchmark(name, metric, shots)."
        )
    return known[task]


def _refuse_downloads(tasks: Sequence[Benchmark], allow_download: bool) -> None:
    hub = [task.name for task in tasks if task.config is None]
    allowed = os.environ.get(DOWNLOAD_VARIABLE, "").lower() in ("1", "true", "yes")
    if hub and not (allow_download or allowed):
        raise DownloadRefused(
            f"the questions of {', '.join(hub)} come from the Hub: allow that with "
            f"allow_download=True or {DOWNLOAD_VARIABLE}=1, or run COURSE_TASKS, which need no "
            "network."
        )


def _without_code(tasks: Sequence[Benchmark], allowed: bool) -> list[Benchmark]:
    names = ", ".join(task.name for task in tasks if task.runs_code)
    if names and allowed:
        print(f"{names}: running programs that the model wrote, with your rights.")
    elif names:
        print(
            f"left out: {names}. They run programs that the model wrote; in a container without "
            "network, allow_code_execution=True takes them in."
        )
    return [task for task in tasks if allowed or not task.runs_code]


@contextlib.contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """lm-eval's progress bars on stdout or nowhere, its log at errors only."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(sys.stdout if progress else io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _code_allowed(allowed: bool) -> Iterator[None]:
    """Set the variable that lm-eval's code tasks ask for, and put it back."""
    before = os.environ.get(CODE_VARIABLE)
    if allowed:
        os.environ[CODE_VARIABLE] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(CODE_VARIABLE, None)
        else:
            os.environ[CODE_VARIABLE] = before


def _manager(tasks: Sequence[Benchmark]) -> Any:
    """lm-eval's index of tasks; its thousands are read only where one of them is wanted."""
    from lm_eval.tasks import TaskManager

    named = [task.name for task in tasks if task.config is None]
    manager = TaskManager(include_defaults=bool(named))
    for name in named:
        if name not in manager.all_tasks:
            raise ParameterError(f"lm-eval has no task {name!r}.{nearest(name, manager.all_tasks)}")
    return manager


def _scores(
    lm: Any, manager: Any, task: Benchmark, limit: int | None, chat_template: bool, seed: int
) -> list[float]:
    """The metric of every item of a task, the subtasks of a group one after the other."""
    from lm_eval import simple_evaluate

    samples = simple_evaluate(
        model=lm,
        tasks=[task.config() if task.config else task.name],
        num_fewshot=task.shots,
        limit=limit,
        bootstrap_iters=0,  # intervals are ours
        apply_chat_template=chat_template,
        task_manager=manager,
        fewshot_random_seed=seed,
        confirm_run_unsafe_code=task.runs_code,
    )["samples"]
    items = [item for part in samples.values() for item in part if item["filter"] == task.filter]
    if not items:
        filters = {item["filter"] for part in samples.values() for item in part}
        raise ParameterError(
            f"{task.name} has no filter {task.filter!r}; it has {', '.join(sorted(filters))}."
        )
    if any(task.metric not in item for item in items):
        names = items[0]["metrics"]
        raise ParameterError(
            f"{task.name} has no metric {task.metric!r}; it has {', '.join(names)}."
            + nearest(task.metric, names)
        )
    return [float(item[task.metric]) for item in items]


def _mean_of(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def _documents(document: Callable[..., Row], section: str | None = None) -> dict[str, Any]:
    """The part of a task's configuration that is alike: data, splits and the question."""

    def dataset(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        from data_prep.embedded import load_prompts

        rows = {}
        for split in ("evaluation", "validation"):
            prompts = load_prompts(split)
            chosen = [p for p in prompts if section in (None, p["section"])]
            rows[split] = Dataset.from_list([document(p, prompts) for p in chosen])
        return rows

    return {
        "custom_dataset": dataset,
        "test_split": "evaluation",
        "fewshot_split": "validation",  # solved examples, never from training data
        "doc_to_text": "question",
    }


def _facts_document(prompt: Row, prompts: Sequence[Row]) -> Row:
    others = [
        other["short"]
        for other in sorted(prompts, key=lambda row: _digest(prompt, row))
        if other["section"] == prompt["section"] and other is not prompt
    ]
    gold = int(_digest(prompt, prompt), 16) % CHOICES
    choices = others[: CHOICES - 1]
    choices.insert(gold, prompt["short"])
    return {"question": question(prompt), "choices": choices, "gold": gold}


def _answers_document(prompt: Row, prompts: Sequence[Row]) -> Row:
    return {key: prompt[key] for key in ("facts", "reference")} | {"question": question(prompt)}


def question(prompt: Row) -> str:
    """Return what a prompt of the miniature asks, without its format instruction."""
    from data_prep.instructions import WORDINGS, describe

    text, instruction = prompt["messages"][-1]["content"], prompt["instruction"]
    if instruction is None:
        return text
    endings = [
        " " + describe(instruction, wording)
        for wording in range(len(WORDINGS[instruction["kind"]]))
    ]
    return next(text.removesuffix(end) for end in endings if text.endswith(end))


def _digest(one: Row, other: Row) -> str:
    """The same order of the other prompts on every machine, another one for each prompt."""
    return hashlib.sha256(f"{one['prompt_id']}/{other['prompt_id']}".encode()).hexdigest()


def _facts_named(doc: Row, results: Sequence[str]) -> dict[str, float]:
    from rlhf_guide.oracle import facts_covered

    return {"facts": facts_covered(doc["facts"], results[0])}
