"""The main result over seeds, with stubs for training; and which result a chapter is shown."""

import pytest

from rlhf_guide import online_seeds as study
from rlhf_guide import studies
from rlhf_guide.errors import MissingStage
from rlhf_guide.files import read_jsonl, write_json, write_jsonl
from rlhf_guide.profiles import load_profile
from rlhf_guide.workspace import open_run

OFFLINE, ONLINE = study.POLICIES


@pytest.fixture
def ws(tmp_path):
    """A run folder with the stages that the study borrows, and 20 stored pairs."""
    made = open_run(load_profile("smoke"), tmp_path / "run")
    data = made.stage("data", {})
    write_jsonl(data.dir / "preference_train.jsonl", [{"prompt_id": f"s{i}"} for i in range(20)])
    data.finish()
    for name in ("sft", "reward_model", "evaluation_answers_sft"):
        stage = made.stage(name, {}, ["data"])
        write_json(stage.dir / "model" / "config.json", {})
        stage.finish()
    return made


def test_summary_is_what_a_hand_computes():
    def row(policy, seed, utility):
        return {"policy": policy, "seed": seed, "utility": utility}

    rows = [
        row(OFFLINE, 1, [1.0, 1.0]),
        row(ONLINE, 1, [2.0, 1.0]),
        row(OFFLINE, 2, [0.0, 2.0]),
        row(ONLINE, 2, [2.0, 5.0]),
    ]
    found = study.summary([0.0, 1.0], rows, n_boot=200)
    means = {name: found[name]["value"] for name in ("sft", OFFLINE, ONLINE)}
    assert means == {"sft": 0.5, OFFLINE: 1.0, ONLINE: 2.5}
    assert found["online_minus_sft"]["value"] == 2.0
    assert found["online_minus_sft_of_seeds"] == [1.0, 3.0]
    gain = found["online_minus_matched"]
    assert gain == {"value": 1.5, "low": 1.5, "high": 1.5, "n": 2}, "both prompts gain 1.5"
    assert found["online_minus_matched_of_seeds"] == [0.5, 2.5]


def test_the_run_s_own_seed_is_the_run_and_others_borrow_its_stages(ws):
    assert study.seed_run(ws, ws.profile.seed) is ws
    other = study.seed_run(ws, 7)
    assert other.path.parent == ws.path.parent
    assert other.path != ws.path
    assert other.profile.seed == 7
    for name in study.BORROWED:
        assert other.load(name).fingerprint == ws.load(name).fingerprint
    with pytest.raises(MissingStage):
        other.load("evaluation_answers_sft")
    other.stage("online", {}).finish()
    assert study.seed_run(ws, 7).load("online").done, "opened a second time, nothing is lost"
    assert sorted(stage.name for stage in ws.finished()) == sorted(
        [*study.BORROWED, "evaluation_answers_sft"]
    )


def test_a_killed_study_goes_on_and_its_control_has_equal_volume(ws, monkeypatch):
    played, trained, judged = [], [], []

    def train_dpo(reference, pairs, settings, folder, seed, dtype):
        if seed == 43 and not trained[1:]:
            trained.append("killed")
            raise KeyboardInterrupt
        trained.append((reference, [row["prompt_id"] for row in pairs], settings, seed))

    def judge_policy(policy, prompts, answers, seed, profile):
        judged.append((policy, seed, profile.seed))
        return [float(policy[0] == "online") * seed] * len(prompts), 9.0

    monkeypatch.setattr(study, "train_dpo", train_dpo)
    monkeypatch.setattr(study, "judge_policy", judge_policy)
    monkeypatch.setattr(
        study, "run_online", lambda run, profile: played.append((run.path, profile))
    )
    monkeypatch.setattr(study, "chosen_policy", lambda run: ("online", run.path))
    monkeypatch.setattr(study, "evaluation_prompts", lambda *_: [{"facts": []}] * 2)
    monkeypatch.setattr(study, "evaluation_answers", lambda *_: [])
    monkeypatch.setattr(study, "true_utilities", lambda _: ([0.0, 0.0], 9.0))
    with pytest.raises(KeyboardInterrupt):
        study.run_seeds(ws, seeds=2)
    stage = study.run_seeds(ws, seeds=2)
    rows = read_jsonl(stage.dir / "utilities.jsonl")
    assert [(row["seed"], row["policy"]) for row in rows] == [
        (seed, name) for seed in (42, 43) for name in (OFFLINE, ONLINE)
    ]
    online = ws.profile.online
    first, killed, second = trained
    assert killed == "killed"
    assert len(first[1]) == len(set(first[1])) == online.iterations * online.prompts_per_iteration
    assert first[1] != second[1], "another seed draws other pairs"
    assert all(call[0] == ws.path / "sft" / "model" for call in (first, second))
    assert [(path, profile.seed) for path, profile in played] == [
        (ws.path, 42),
        (ws.path.with_name("run_seed_43"), 43),
    ]
    assert [(seed, noise) for _, seed, noise in judged] == [(42, 42)] * 2 + [(43, 43)] * 2
    assert stage.metrics["online_minus_sft_of_seeds"] == [42.0, 43.0]
    assert study.run_seeds(ws, seeds=2).done
    assert len(trained) == 3


def test_a_chapter_is_shown_the_run_s_own_result_else_the_course_s(ws, tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "RESULTS", tmp_path / "results")
    with pytest.raises(MissingStage, match=study.STAGE):
        studies.load_study(ws, study.STAGE)
    other = open_run(load_profile("smoke"), tmp_path / "other")
    kept = studies.keep(other.stage(study.STAGE, {"seeds": 3}).finish({"gain": 1.0}))
    assert kept == tmp_path / "results" / f"{study.STAGE}.json"
    found = studies.load_study(ws, study.STAGE)
    assert (found["own"], found["metrics"], found["config"]) == (False, {"gain": 1.0}, {"seeds": 3})
    assert found["versions"]["rlhf_guide"]
    assert found["finished_at"]
    ws.stage(study.STAGE, {"seeds": 2}).finish({"gain": 2.0})
    found = studies.load_study(ws, study.STAGE)
    assert (found["own"], found["metrics"]) == (True, {"gain": 2.0})
