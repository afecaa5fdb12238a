"""Evaluation answers are drawn once, and prompts that were trained on are refused."""

import pytest

from data_prep.embedded import SPLITS, load_prompts
from rlhf_guide import evaluation_answers as answers
from rlhf_guide.errors import DataError, ParameterError
from rlhf_guide.profiles import load_profile
from rlhf_guide.workspace import open_run, write_jsonl

POLICIES = answers.POLICIES
SETTINGS = load_profile("smoke", evaluation_prompts=2, evaluation_samples_per_prompt=2)


def prompt(text, name="evaluation-1"):
    return {"prompt_id": name, "messages": [{"role": "user", "content": text}]}


@pytest.fixture
def ws(tmp_path):
    """A run folder whose policies and reward model have finished, with three prompts."""
    made = open_run(SETTINGS, tmp_path / "run")
    data = made.stage("data", {})
    questions = [prompt(f"Question {i}?", f"e{i}") for i in range(3)]
    write_jsonl(data.dir / "prompts_evaluation.jsonl", questions)
    data.finish()
    for name in ("sft", "reward_model", "offline_dpo", "online"):
        made.stage(name, {"trained": 1}).finish()
    return made


@pytest.fixture
def drawn(monkeypatch):
    """Sampling and scoring replaced by constants; the list of calls."""
    calls = []

    def generate(model, prompts, settings, temperatures, seed, out_path, dtype, adapter):
        calls.append((model, adapter, [p["prompt_id"] for p in prompts], tuple(temperatures), seed))
        response = {"text": "Yes.", "finish_reason": "stop", "n_tokens": 2}
        rows = [{**p, "responses": [response] * len(temperatures)} for p in prompts]
        write_jsonl(out_path, rows)
        return rows

    def annotate(rows, scorer, out_path):
        write_jsonl(
            out_path, [{**row, "rewards": [scorer] * len(row["responses"])} for row in rows]
        )

    found = {name: (stage, lambda ws, n=name: (n, None)) for name, (stage, _) in POLICIES.items()}
    monkeypatch.setattr(answers, "POLICIES", found)
    monkeypatch.setattr(answers, "generate", generate)
    monkeypatch.setattr(answers, "annotate", annotate)
    return calls


def ask(ws, name="sft", settings=SETTINGS):
    return answers.evaluation_answers(ws, settings, name, scorer=lambda: 0.5)


def test_answers_are_drawn_once_and_then_read(ws, drawn):
    first = ask(ws)
    assert [row["rewards"] for row in first] == [[0.5, 0.5], [0.5, 0.5]]
    assert ask(ws) == first
    assert len(drawn) == 1


def test_every_policy_gets_the_same_prompts_temperatures_and_seed(ws, drawn):
    for name in POLICIES:
        ask(ws, name)
    assert [model for model, *_ in drawn] == list(POLICIES)
    assert all(call[2:] == drawn[0][2:] for call in drawn)


def test_other_settings_draw_again_and_analysis_settings_do_not(ws, drawn):
    ask(ws)
    ask(ws, settings=load_profile("smoke", evaluation_prompts=2, evaluation_samples_per_prompt=1))
    assert len(drawn) == 2
    more = load_profile(
        "smoke",
        evaluation_prompts=2,
        evaluation_samples_per_prompt=1,
        evaluation_bootstrap_samples=999,
        evaluation_judge_url="http://127.0.0.1:8000/v1",
    )
    ask(ws, settings=more)
    assert len(drawn) == 2


def test_a_newly_trained_policy_answers_again(ws, drawn):
    ask(ws, "offline_dpo")
    ask(ws, "sft")
    ws.stage("offline_dpo", {"trained": 2}).finish()
    ask(ws, "offline_dpo")
    ask(ws, "sft")
    assert [call[0] for call in drawn] == ["offline_dpo", "sft", "offline_dpo"]


def test_an_unknown_policy_is_refused_with_the_nearest_name(ws):
    with pytest.raises(ParameterError, match=r"Did you mean 'online_dpo'\?"):
        ask(ws, "online_dop")


RUN = [f"word{number}" for number in range(13)]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (prompt("Something else entirely, with other words.", "evaluation-1"), "same id"),
        (prompt("ONE two, three  four five?", "other"), "same words"),
        (prompt("Please: one two three four five. Thanks!", "other"), "same words"),
    ],
)
def test_a_prompt_that_was_trained_on_is_refused_by_name(row, why):
    mine = [prompt("one two three four five"), prompt("What is left?", "evaluation-2")]
    with pytest.raises(DataError, match=rf"1 of 2 .*evaluation-1 and {row['prompt_id']} in sft"):
        answers.refuse_overlap(mine, {"sft": [row], "other": [prompt("Fine as it is.", "o")]})
    assert [found["why"] for found in answers.overlaps(mine, {"sft": [row]})] == [why]


def test_thirteen_words_in_a_row_overlap_and_twelve_do_not():
    mine = [prompt(" ".join([*RUN, "and", "more"]))]
    twelve = [prompt(" ".join(["Say", *RUN[:12]]), "o1")]
    assert answers.refuse_overlap(mine, {"preference_train": twelve}) == 1
    with pytest.raises(DataError, match="same words"):
        answers.refuse_overlap(mine, {"preference_train": [prompt(" ".join(RUN), "o2")]})


def test_an_answer_is_no_prompt():
    mine = [prompt("Where does the river Po begin?")]
    said = {"role": "assistant", "content": "You asked: where does the river Po begin?"}
    demonstration = {"id": "s1", "messages": [*prompt("Ask me something.")["messages"], said]}
    pair = {"prompt_id": "p1", "chosen": demonstration["messages"], "rejected": []}
    assert answers.refuse_overlap(mine, {"sft": [demonstration], "pairs": [pair]}) == 2


def test_the_other_tables_are_all_but_the_evaluation_prompts(ws):
    write_jsonl(ws.path / "data" / "sft.jsonl", [{"id": "s", "messages": []}])
    assert list(answers.other_tables(ws)) == ["sft"]


def test_the_miniature_s_evaluation_prompts_stand_nowhere_else():
    splits = {name: load_prompts(name) for name in SPLITS if name != "evaluation"}
    evaluated = load_prompts("evaluation")
    assert answers.refuse_overlap(evaluated, splits) == sum(map(len, splits.values()))
    leaked = {**evaluated[0], "prompt_id": "another-id"}
    with pytest.raises(DataError, match=rf"{evaluated[0]['prompt_id']} and another-id in sft"):
        answers.refuse_overlap(evaluated, {**splits, "sft": [*splits["sft"], leaked]})
