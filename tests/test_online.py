"""Algorithm 2 from end to end on a tiny model, killed at several moments and resumed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from online_world import make_run, tiny_profile

from rlhf_guide.chat import CHATML, encode_conversation
from rlhf_guide.errors import DataError, MissingStage, ParameterError
from rlhf_guide.models import load_tokenizer, weights_hash
from rlhf_guide.online import check_slices, choose_checkpoint, run_iteration, run_online
from rlhf_guide.online_report import describe
from rlhf_guide.online_stages import (
    lazy_scorer,
    load_pairs,
    load_pairs_with_reference,
    load_slice,
    mixed_temperatures,
    sample_reference,
    score_answers,
    select_pairs,
    train_policy,
)
from rlhf_guide.policies import chosen_policy, iteration_policy, model_folder, sft_policy
from rlhf_guide.preference_model import PreferenceScorer
from rlhf_guide.reward_model import RewardScorer
from rlhf_guide.workspace import open_run, read_json, read_jsonl, write_jsonl

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.timeout(600)  # a busy machine is slow to import the libraries

STEPS = ("generation", "annotation", "pairs", "dpo", "validation")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("online") / "prepared"
    make_run(folder, tiny_profile())
    return folder


@pytest.fixture(scope="module")
def finished(prepared, tmp_path_factory):
    """One uninterrupted run: its folder, its lines of progress, its result."""
    folder = tmp_path_factory.mktemp("online") / "finished"
    shutil.copytree(prepared, folder)
    lines = []
    ws = open_run(tiny_profile(), folder)
    return ws, lines, run_online(ws, tiny_profile(), lines.append)


@pytest.fixture
def fresh(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "run")
    return tmp_path / "run"


def rows_of(ws, t, step, file):
    return read_jsonl(ws.load(f"online/iteration_{t}/{step}").dir / file)


def test_three_iterations_leave_every_stage_finished(finished):
    ws, lines, result = finished
    names = {stage.name for stage in ws.finished()}
    assert {f"online/iteration_{t}/{step}" for t in (1, 2, 3) for step in STEPS} <= names
    assert {"online", "online/iteration_0/validation"} <= names
    assert [row["iteration"] for row in result["history"]] == [1, 2, 3]
    assert any("iteration 3" in line and "validation reward" in line for line in lines)


def test_half_of_the_samples_at_each_temperature(finished):
    ws, _, _ = finished
    for row in rows_of(ws, 1, "generation", "generations.jsonl"):
        used = Counter(response["temperature"] for response in row["responses"])
        assert used == {1.0: 2, 0.7: 2}


def test_iterations_see_disjoint_prompts_and_their_own_noise(finished):
    ws, _, _ = finished
    prompts = [
        {row["prompt_id"] for row in rows_of(ws, t, "generation", "generations.jsonl")}
        for t in (1, 2, 3)
    ]
    assert len(set.union(*prompts)) == sum(map(len, prompts)) == 9
    assert check_slices(ws, tiny_profile())["validation"] == 3


def test_pairs_are_the_best_and_the_worst_of_their_prompt(finished):
    ws, _, _ = finished
    rewards = {
        row["prompt_id"]: row["rewards"] for row in rows_of(ws, 2, "annotation", "annotated.jsonl")
    }
    pairs = load_pairs(ws, 2)
    assert pairs
    for pair in pairs:
        assert pair["chosen_reward"] == max(rewards[pair["prompt_id"]])
        assert pair["rejected_reward"] == min(rewards[pair["prompt_id"]])
        assert pair["iteration"] == 2
        assert pair["facts"]


def test_reference_never_moves_while_the_policy_does(finished):
    ws, _, result = finished
    rows = result["history"]
    reference = weights_hash(sft_policy(ws)[0])
    assert {row["dpo_reference_hash"] for row in rows} == {reference}
    assert rows[0]["dpo_start_loss"] == pytest.approx(np.log(2), abs=1e-4)
    # A warm start begins away from π0; its first loss is no longer ln 2.
    assert abs(rows[1]["dpo_start_loss"] - np.log(2)) > 1e-6
    adapters = {iteration_policy(ws, t)[1] for t in (1, 2, 3)}
    assert len(adapters) == 3
    assert {iteration_policy(ws, t)[0] for t in (0, 1, 2, 3)} == {sft_policy(ws)[0]}


def test_checkpoint_has_the_highest_validation_reward(finished):
    ws, _, result = finished
    rewards = [row["validation_reward"]["value"] for row in result["history"]]
    assert result["iteration"] == int(np.argmax(rewards)) + 1
    assert chosen_policy(ws) == iteration_policy(ws, result["iteration"])
    by_truth = choose_checkpoint(ws, tiny_profile(), "utility")
    truths = [row["validation_utility"]["value"] for row in result["history"]]
    assert by_truth["iteration"] == int(np.argmax(truths)) + 1
    assert choose_checkpoint(ws, tiny_profile())["iteration"] == result["iteration"]


def test_running_again_repeats_nothing(finished):
    ws, _, result = finished
    before = {stage.name: stage.manifest["finished_at"] for stage in ws.finished()}
    again = run_online(open_run(tiny_profile(), ws.path), tiny_profile(), lambda line: None)
    assert again["history"] == result["history"]
    assert {stage.name: stage.manifest["finished_at"] for stage in ws.finished()} == before


# Moments to kill at: what must exist. Each kill goes on in the folder that the last one left.
MOMENTS = [
    "online/iteration_1/generation/pending.json",
    "online/iteration_2/dpo/pending.json",
    "online/iteration_3/validation/pending.json",
]


def kill_when(folder: Path, sign: str, limit: float = 200.0) -> None:
    """Start the run and kill -9 it as soon as a file exists."""
    command = [sys.executable, str(Path(__file__).with_name("online_world.py")), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + limit
    while not (folder / sign).exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, f"{sign} never appeared"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.timeout(900)
def test_killed_runs_resume_to_the_same_pairs(finished, fresh):
    reference, _, expected = finished
    kept = {}
    for sign in MOMENTS:
        kill_when(fresh, sign)
        ws = open_run(tiny_profile(), fresh)
        for name, when in kept.items():
            assert ws.load(name).manifest["finished_at"] == when, f"{name} was done twice"
        kept = {stage.name: stage.manifest["finished_at"] for stage in ws.finished()}
    result = run_online(open_run(tiny_profile(), fresh), tiny_profile(), lambda line: None)
    for t in (1, 2, 3):
        assert load_pairs(open_run(tiny_profile(), fresh), t) == load_pairs(reference, t)
    assert result["iteration"] == expected["iteration"]


def test_history_replay_starts_at_the_reference_with_all_pairs(fresh):
    profile = tiny_profile(warm_start=False)
    ws = open_run(profile, fresh)
    first = run_iteration(ws, 1, profile)
    second = run_iteration(ws, 2, profile, first["adapter"])["metrics"]
    assert second["dpo_start_loss"] == pytest.approx(np.log(2), abs=1e-4)
    total = first["metrics"]["pairs"] + second["pairs"]
    assert ws.load("online/iteration_2/dpo").metrics["pairs"] == total


def test_moving_reference_is_the_previous_policy(fresh):
    profile = tiny_profile(reference="previous")
    ws = open_run(profile, fresh)
    first = run_iteration(ws, 1, profile)
    second = run_iteration(ws, 2, profile, first["adapter"])["metrics"]
    assert second["dpo_reference_hash"] == weights_hash(first["adapter"])
    assert second["dpo_reference_hash"] != weights_hash(sft_policy(ws)[0])
    assert second["dpo_start_loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert iteration_policy(ws, 2)[1] is None


def test_the_preference_model_can_rank_the_answers(finished, tmp_path):
    shutil.copytree(finished[0].path, tmp_path / "run")
    profile = tiny_profile(rank_by="preference_model")
    ws = open_run(profile, tmp_path / "run")
    with pytest.raises(MissingStage, match="04_preference_model"):
        run_iteration(ws, 1, profile)
    judge = ws.stage("preference_model", {}, ["data"])
    shutil.copytree(sft_policy(ws)[0], judge.dir / "model")
    judge.finish()
    stage = select_pairs(ws, 1, profile)
    assert set(stage.inputs) == {"online/iteration_1/annotation", "preference_model"}
    pairs = load_pairs(ws, 1)
    assert stage.metrics["pairs"] == len(pairs) > 0
    scorer = PreferenceScorer(judge.dir / "model", torch.float32)
    met = [(p["chosen"][:-1], p["chosen"][-1]["content"], p["rejected"][-1]["content"])
           for p in pairs]  # fmt: skip
    chances = scorer.probability(met)
    assert [pair["chosen_score"] for pair in pairs] == pytest.approx(chances, abs=1e-5)
    assert min(chances) > 0.5


def test_the_optimistic_term_trains_on_answers_of_the_reference(finished, fresh):
    profile = tiny_profile()
    profile = replace(profile, dpo=replace(profile.dpo, optimism_weight=1e-3))
    ws = open_run(profile, fresh)
    run_iteration(ws, 1, profile)
    first = rows_of(ws, 1, "generation", "generations.jsonl")
    drawn = rows_of(ws, 1, "reference", "generations.jsonl")
    # π0 answers in iteration 1: its answer is the first of those already drawn.
    assert [row["responses"] for row in drawn] == [row["responses"][:1] for row in first]
    texts = {row["prompt_id"]: row["responses"][0]["text"] for row in drawn}
    for pair in load_pairs_with_reference(ws, 1):
        assert pair["reference"][-1]["content"] == texts[pair["prompt_id"]]
    history = read_json(ws.load("online/iteration_1/dpo").dir / "history.json")
    assert all(step["logps/reference"] < 0 for step in history if "loss" in step)
    sample_reference(ws, 2, profile)
    models = {row["model"] for row in rows_of(ws, 2, "reference", "generations.jsonl")}
    assert models == {row["model"] for row in first}
    plain = rows_of(finished[0], 2, "generation", "generations.jsonl")
    assert models.isdisjoint({row["model"] for row in plain})


class Indifferent:
    """A reward model that likes every answer alike."""

    name = "indifferent"

    def score(self, conversations, batch_size):
        return np.zeros(len(conversations))


def test_few_empty_and_equally_good_answers_are_counted_and_end_in_plain_words(finished, fresh):
    profile = tiny_profile()
    ws = open_run(profile, fresh)
    rows = rows_of(finished[0], 1, "generation", "generations.jsonl")
    for number, row in enumerate(rows):
        row["responses"] = row["responses"][: 1 + number]
        row["responses"][0]["text"] = ""
    drawn = ws.stage("online/iteration_1/generation", {})
    write_jsonl(drawn.dir / "generations.jsonl", rows)
    drawn.finish()
    scored = score_answers(ws, 1, profile, Indifferent).metrics
    assert scored["fewer_answers"] == len(rows) == 3
    assert scored["empty"] == pytest.approx(3 / 6)
    counts = select_pairs(ws, 1, profile).metrics
    assert (counts["pairs"], counts["dropped_too_few"], counts["dropped_tie"]) == (0, 1, 2)
    with pytest.raises(DataError, match=r"None of the 0 .*dropped_tie"):
        train_policy(ws, 1, profile, None)


def test_a_reward_model_reads_messages_in_its_own_template(prepared, tmp_path):
    """Text templated for the policy would reach a reward model of another family garbled."""
    ws = open_run(tiny_profile(), prepared)
    shutil.copytree(model_folder(ws.load("reward_model")), tmp_path / "other")
    tokenizer = load_tokenizer(tmp_path / "other")
    tokenizer.chat_template = "<|im_start|>system\nJudge.<|im_end|>\n" + CHATML
    tokenizer.save_pretrained(tmp_path / "other")
    talk = [*load_slice(ws, 1)[0]["messages"], {"role": "assistant", "content": "It is blue."}]
    ids = encode_conversation(tokenizer, talk)
    assert ids != encode_conversation(load_tokenizer(sft_policy(ws)[0]), talk)
    theirs = RewardScorer(tmp_path / "other", torch.float32)
    with torch.no_grad():
        expected = theirs.model(torch.tensor([ids])).logits.item()
    assert theirs.score([talk]) == pytest.approx([expected], abs=1e-5)
    assert theirs.score([talk]) != pytest.approx(lazy_scorer(ws, tiny_profile())().score([talk]))


def test_bad_input_is_refused_in_plain_words(fresh):
    ws = open_run(tiny_profile(), fresh)
    with pytest.raises(ParameterError, match="must be even"):
        mixed_temperatures(replace(tiny_profile().online, samples_per_prompt=3))
    with pytest.raises(ParameterError, match="'reward' or 'utility'"):
        choose_checkpoint(ws, tiny_profile(), "vibes")
    with pytest.raises(MissingStage, match="07_online_dpo"):
        chosen_policy(ws)
    with pytest.raises(MissingStage, match="'data' has no model"):
        model_folder(ws.load("data"))


def test_a_prompt_in_two_slices_is_refused(fresh):
    ws = open_run(tiny_profile(), fresh)
    folder = ws.load("data").dir
    slices = {path.name: read_jsonl(path) for path in folder.glob("prompts_*.jsonl")}
    slices["prompts_online_2.jsonl"][0] = slices["prompts_online_1.jsonl"][0]
    data = ws.stage("data", {"leak": True})
    for name, rows in slices.items():
        write_jsonl(data.dir / name, rows)
    data.finish()
    with pytest.raises(DataError, match="in iteration 1 and in iteration 2"):
        check_slices(ws, tiny_profile())
    with pytest.raises(DataError, match="no prompts for iteration 4"):
        load_slice(ws, 4)


def test_progress_line_names_pairs_reward_and_length(finished):
    line = describe(finished[2]["history"][0])
    assert "pairs from 3 prompts" in line
    assert "tokens an answer" in line
