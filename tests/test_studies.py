"""Relabelled pairs, and the study of reward data with a stub in place of training."""

import numpy as np
import pytest

from rlhf_guide import oracle, studies
from rlhf_guide.cli import main
from rlhf_guide.files import read_json, read_jsonl
from rlhf_guide.profiles import load_profile
from rlhf_guide.workspace import open_run


@pytest.fixture(scope="module")
def pairs():
    return studies._pairs("preference_train", None)


def longer(rows):
    gaps = [len(r["chosen"][-1]["content"]) - len(r["rejected"][-1]["content"]) for r in rows]
    return np.mean(np.sign(gaps))


def test_relabelling_moves_votes_only(pairs):
    verbose = oracle.annotator(0, verbosity_bias=2.0)
    found = studies.relabelled(pairs[:400], verbose)
    assert longer(found) > longer(pairs[:400]) + 0.1
    changed = 0
    for before, after in zip(pairs, found, strict=False):
        texts = [
            {row[side][-1]["content"] for side in ("chosen", "rejected")} for row in (before, after)
        ]
        assert texts[0] == texts[1]
        if before != after:
            changed += 1
            assert before["chosen_score"] == after["rejected_score"]
            assert before["chosen_kind"] == after["rejected_kind"]
    assert 0 < changed < 400


def test_arms_are_equally_large_and_what_they_say(pairs):
    arms = studies.reward_data_arms(pairs, 60, seed=1)
    assert {len(rows) for rows in arms.values()} == {60}
    assert len(arms) == 4
    for name, rows in arms.items():
        assert any(row["section"] == "safety" for row in rows) != name.endswith("no safety")
    best = {}
    for row in pairs:
        score = studies._larger_score(row)
        best[row["prompt_id"]] = max(score, best.get(row["prompt_id"], score))
    rows = arms["best against random"]
    assert all(studies._larger_score(row) == best[row["prompt_id"]] for row in rows)
    assert len({row["prompt_id"] for row in rows}) == 60
    assert arms == studies.reward_data_arms(pairs, 60, seed=1)
    assert arms != studies.reward_data_arms(pairs, 60, seed=2)


def test_the_study_stores_intervals_and_goes_on_after_a_kill(tmp_path, monkeypatch):
    calls = []

    def judged(ws, rows, heldout, seed):
        if len(calls) == 3:
            calls.append("killed")
            raise KeyboardInterrupt
        calls.append(len(rows))
        return [float((i + seed) % 2) for i in range(len(heldout))]

    monkeypatch.setattr(studies, "_train_and_judge", judged)
    ws = open_run(load_profile("smoke"), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        studies.run_reward_data(ws, seeds=2, pairs=20)
    stage = studies.run_reward_data(ws, seeds=2, pairs=20)
    assert len(calls) == 2 * 4 + 1
    assert len(read_jsonl(stage.dir / "verdicts.jsonl")) == 8
    found = ws.load(studies.STAGE).metrics["best against random"]
    assert found["accuracy"]["value"] == pytest.approx(0.5)
    assert found["gain_over_all_pairs"]["value"] == 0
    assert stage.manifest["versions"]["rlhf_guide"]
    assert studies.run_reward_data(ws, seeds=2, pairs=20).done
    assert len(calls) == 9


def test_the_command_runs_a_study_and_says_where_its_result_lies(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(studies, "_train_and_judge", lambda ws, rows, held, seed: [1.0] * len(held))
    monkeypatch.setattr(studies, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    line = ["study", "reward_data", "--profile", "smoke", "--run-dir", str(tmp_path / "run")]
    assert main([*line, "--seeds", "2", "--keep"]) == 0
    kept = tmp_path / "results" / "reward_data.json"
    assert capsys.readouterr().out.endswith(f"finished: {kept}\n")
    found = read_json(kept)
    assert found["config"]["seeds"] == 2
    assert found["metrics"]["all pairs"]["accuracy_of_seeds"] == [1.0, 1.0]


def test_a_study_before_its_stages_is_a_message(tmp_path, capsys):
    line = ["study", "online_arms", "--profile", "smoke", "--run-dir", str(tmp_path)]
    assert main(line) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert main([*line, "--seeds", "0"]) == 1
    assert "at least one" in capsys.readouterr().err
