"""Benchmarks: the paper's tasks and shots, and two local ones that lm-eval really runs."""

import importlib.util
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.embedded import SPLITS, load_prompts
from rlhf_guide import benchmarks
from rlhf_guide.benchmarks import (
    CODE_VARIABLE,
    COURSE_TASKS,
    PAPER_TASKS,
    Benchmark,
    alignment_tax,
    question,
    run_benchmarks,
)
from rlhf_guide.errors import DownloadRefused, GuideError, ParameterError
from rlhf_guide.models import load_policy, load_tokenizer, resolve_model

FACTS, ANSWERS = COURSE_TASKS
needs_lm_eval = pytest.mark.skipif(
    not benchmarks.installed(), reason="lm-eval is not installed (extra `evaluation`)"
)


@pytest.fixture(scope="module")
def policy():
    folder = resolve_model("random-tiny-llama")
    return load_policy(folder, "float32"), load_tokenizer(folder)


@pytest.fixture(scope="module")
def run(policy):
    def call(*tasks, **options):
        return run_benchmarks(*policy, tasks, **{"progress": False, "limit": 4, **options})

    return call


def test_shots_are_those_of_table_6():
    shots = {task.name: task.shots for task in PAPER_TASKS}
    assert shots == {
        "gsm8k": 8,
        "mmlu": 5,
        "humaneval": 0,
        "truthfulqa_mc2": 0,
        "arc_challenge": 25,
        "mbpp": 0,
    }
    assert {task.name for task in PAPER_TASKS if task.runs_code} == {"humaneval", "mbpp"}


@needs_lm_eval
@pytest.mark.parametrize("task", PAPER_TASKS, ids=lambda task: task.name)
def test_lm_eval_knows_the_papers_tasks_and_their_metrics(task):
    folder = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks"
    pattern = re.compile(rf"^(?:task|group): {task.name}\s*$", re.MULTILINE)
    files = sorted(folder.glob(f"{task.name.split('_')[0]}/**/*.yaml"))
    texts = [file.read_text(encoding="utf-8") for file in files]
    (own,) = [text for text in texts if pattern.search(text)]
    family = "\n".join(texts)  # a file may include another one, which holds the metrics
    assert re.search(rf"metric: .*{task.metric.replace('@1', '_at_k')}\b", family)
    assert task.filter == "none" or f'name: "{task.filter}"' in own
    assert ("unsafe_code: true" in own) == task.runs_code


def test_an_unknown_task_is_refused_with_the_nearest_name(run):
    with pytest.raises(ParameterError, match=r"unknown task 'gsm8'.*Did you mean 'gsm8k'\?"):
        run("gsm8")


@needs_lm_eval
def test_a_name_that_lm_eval_does_not_know_is_refused_too(run, monkeypatch):
    class Manager:
        def __init__(self, include_defaults):
            self.all_tasks = ["hellaswag", "winogrande"] if include_defaults else []

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Manager)
    with pytest.raises(ParameterError, match=r"no task 'helaswag'\. Did you mean 'hellaswag'\?"):
        run(Benchmark("helaswag", "acc", shots=0), allow_download=True)


@needs_lm_eval
def test_an_unknown_metric_or_filter_is_refused_with_what_there_is(run):
    with pytest.raises(ParameterError, match=r"no metric 'acc_nrm'.*Did you mean 'acc_norm'\?"):
        run(Benchmark("course_facts", "acc_nrm", shots=0, config=FACTS.config))
    with pytest.raises(ParameterError, match="no filter 'strict'; it has none"):
        run(Benchmark("course_facts", "acc_norm", 0, filter="strict", config=FACTS.config))


def test_tasks_of_the_hub_need_permission(run):
    with pytest.raises(DownloadRefused, match=r"gsm8k, mmlu.*RLHF_GUIDE_ALLOW_DOWNLOAD"):
        run(*PAPER_TASKS)


def test_without_lm_eval_the_reader_learns_how_to_get_it(run, monkeypatch):
    monkeypatch.setattr(benchmarks, "installed", lambda: False)
    with pytest.raises(GuideError, match="pip install"):
        run(FACTS)


@pytest.fixture
def stubbed(monkeypatch):
    """lm-eval replaced by a constant; what it would have been asked, and the variable then."""
    asked = []

    def scores(lm, manager, task, *_):
        asked.append((task.name, task.shots, os.environ.get(CODE_VARIABLE)))
        return [1.0, 0.0]

    monkeypatch.delenv(CODE_VARIABLE, raising=False)
    monkeypatch.setattr(benchmarks, "_manager", lambda tasks: None)
    monkeypatch.setattr(benchmarks, "_scores", scores)
    return asked


@needs_lm_eval
def test_tasks_that_run_code_are_left_out_and_named(run, stubbed, capsys):
    rows = run(*PAPER_TASKS, allow_download=True)
    assert [row["task"] for row in rows] == ["gsm8k", "mmlu", "truthfulqa_mc2", "arc_challenge"]
    assert "left out: humaneval, mbpp" in capsys.readouterr().out
    assert {variable for *_, variable in stubbed} == {None}


@needs_lm_eval
def test_code_runs_only_when_asked_for_and_with_a_warning(run, stubbed, capsys):
    rows = run(*PAPER_TASKS, allow_download=True, allow_code_execution=True)
    assert [row["shots"] for row in rows] == [8, 5, 0, 0, 25, 0]
    assert {variable for *_, variable in stubbed} == {"1"}
    assert CODE_VARIABLE not in os.environ
    assert "running programs that the model wrote" in capsys.readouterr().out


@pytest.fixture(scope="module")
def documents():
    """The items and the solved examples of both local tasks."""
    return {task.name: task.config()["custom_dataset"]() for task in COURSE_TASKS}


def test_local_items_come_from_evaluation_prompts_and_examples_from_validation(documents):
    asked = {split: {question(prompt) for prompt in load_prompts(split)} for split in SPLITS}
    training = set.union(*(asked[s] for s in asked if s not in ("evaluation", "validation")))
    for data in documents.values():
        assert set(data["evaluation"]["question"]) <= asked["evaluation"] - training
        assert set(data["validation"]["question"]) <= asked["validation"] - training
    assert len(documents["course_facts"]["evaluation"]) == SPLITS["evaluation"] * 4
    assert len(documents["course_answers"]["evaluation"]) == SPLITS["evaluation"]


def test_questions_have_no_format_instruction():
    for prompt in load_prompts("evaluation"):
        text, whole = question(prompt), prompt["messages"][0]["content"]
        assert whole.startswith(text)
        assert (text == whole) == (prompt["instruction"] is None)


def test_the_right_choice_is_the_own_answer_in_every_place(documents):
    shorts = {question(p): p["short"] for p in load_prompts("evaluation")}
    items = documents["course_facts"]["evaluation"]
    assert all(item["choices"][item["gold"]] == shorts[item["question"]] for item in items)
    assert all(len(set(item["choices"])) == 4 for item in items)
    counts = np.bincount(items["gold"], minlength=4)
    assert counts.min() >= 0.15 * len(items)


def likelihood_choice(model, tokenizer, item) -> int:
    """The choice of highest log-likelihood a character, computed without lm-eval."""
    scores = []
    for choice in item["choices"]:
        context = tokenizer(item["question"])["input_ids"]
        ids = torch.tensor([tokenizer(f"{item['question']} {choice}")["input_ids"]])
        with torch.inference_mode():
            logs = model(ids).logits[0, :-1].log_softmax(dim=-1)
        taken = logs.gather(1, ids[0, 1:, None])[len(context) - 1 :]
        scores.append(float(taken.sum()) / len(choice))
    return int(np.argmax(scores))


@needs_lm_eval
def test_multiple_choice_is_decided_by_the_models_likelihood(run, policy, documents):
    (row,) = run(FACTS, limit=12)
    items = list(documents["course_facts"]["evaluation"])[:12]
    expected = [float(likelihood_choice(*policy, item) == item["gold"]) for item in items]
    assert row["scores"] == expected
    assert row["value"] == pytest.approx(np.mean(expected))
    assert (row["task"], row["metric"], row["n"], row["shots"]) == (
        "course_facts",
        "acc_norm",
        12,
        0,
    )
    assert row["low"] <= row["value"] <= row["high"]


@needs_lm_eval
def test_the_same_call_gives_the_same_rows_with_shots_and_template(run):
    shots = Benchmark("course_facts", "acc_norm", shots=2, config=FACTS.config)
    calls = [run(shots, ANSWERS, chat_template=True, n_boot=50) for _ in range(2)]
    assert calls[0] == calls[1]
    assert [row["n"] for row in calls[0]] == [4, 4]


def test_free_answers_earn_the_share_of_the_facts_they_name():
    score = ANSWERS.config()["process_results"]
    doc = {"facts": [["13", "thirteen"], ["subtract"]]}
    assert score(doc, ["You get Thirteen dollars."]) == {"facts": 0.5}
    assert score(doc, ["Subtract 7: 13."]) == {"facts": 1.0}
    assert score(doc, ["130"]) == {"facts": 0.0}


def result(task, scores):
    base = {"task": task, "metric": "acc", "value": np.mean(scores), "low": 0, "high": 1}
    return {**base, "n": len(scores), "shots": 0, "scores": scores}


def test_alignment_tax_pairs_the_items():
    rng = np.random.default_rng(0)
    before = (rng.random(200) < 0.5).astype(float)
    after = before.copy()
    after[:20] = 0.0  # forgets the same few items, whatever the rest
    (row,) = alignment_tax([result("facts", list(before))], [result("facts", list(after))])
    assert row["difference"]["value"] == pytest.approx(after.mean() - before.mean())
    assert row["difference"]["high"] < 0
    width = row["difference"]["high"] - row["difference"]["low"]
    assert width < 0.1
    assert row["before"]["n"] == 200


def test_alignment_tax_refuses_other_tasks_or_items():
    one = [result("facts", [1.0, 0.0])]
    for other in ([result("answers", [1.0, 0.0])], [result("facts", [1.0])], []):
        with pytest.raises(ParameterError, match="cannot be compared"):
            alignment_tax(one, other)
