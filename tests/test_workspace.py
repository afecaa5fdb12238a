"""Run folders: finished stages stay done, changed ones are redone, errors say what to do."""

import errno
import json
import os

import pytest

from rlhf_guide import files, workspace
from rlhf_guide.errors import DataError, GuideError, MissingStage, RunMismatch
from rlhf_guide.files import append_jsonl, read_json, read_jsonl, write_json, write_jsonl
from rlhf_guide.profiles import load_profile
from rlhf_guide.workspace import open_run

SMOKE = load_profile("smoke")


@pytest.fixture
def ws(tmp_path):
    return open_run(SMOKE, tmp_path / "run")


def make(ws, name, text="content", config=None, inputs=()):
    """Do a stage with one file, unless it is done."""
    stage = ws.stage(name, config or {"a": 1}, inputs)
    if not stage.done:
        (stage.dir / "out.txt").write_text(text)
        stage.finish({"length": len(text)})
    return stage


def test_finished_stage_is_not_done_twice(ws):
    assert not ws.stage("data", {"a": 1}).done
    make(ws, "data")
    again = ws.stage("data", {"a": 1})
    assert again.done
    assert again.metrics == {"length": 7}
    assert ws.load("data").fingerprint == again.fingerprint


def test_manifest_says_what_the_stage_was(ws):
    manifest = make(ws, "sft", inputs=[make(ws, "data").name]).manifest
    assert manifest["status"] == "finished"
    assert manifest["outputs"].keys() == {"out.txt"}
    assert manifest["inputs"]["data"] == ws.load("data").fingerprint
    assert {"python", "torch", "transformers", "trl", "peft", "datasets", "rlhf_guide"} == set(
        manifest["versions"]
    )
    assert manifest["seconds"] >= 0
    assert manifest["peak_gib"] > 0
    assert manifest["device"]
    assert manifest["dtype"]


def test_changed_settings_redo_the_stage_and_say_so(ws, capsys):
    make(ws, "data", "old")
    (ws.path / "data" / "extra").mkdir()
    (ws.path / "data" / "extra" / "file").write_text("")
    stage = ws.stage("data", {"a": 2})
    assert not stage.done
    assert "settings have changed (a)" in capsys.readouterr().out
    assert [path.name for path in stage.dir.iterdir()] == ["pending.json"]


def test_changed_input_redoes_what_builds_on_it(ws, capsys):
    make(ws, "data", "old")
    make(ws, "sft", inputs=["data"])
    make(ws, "data", "new", config={"a": 2})
    assert not ws.stage("sft", {"a": 1}, ["data"]).done
    assert "inputs have changed" in capsys.readouterr().out


def test_settings_order_and_type_do_not_matter(ws):
    make(ws, "sft", config=SMOKE.sft)
    assert ws.stage("sft", dict(reversed(vars(SMOKE.sft).items()))).done


@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_text("x")])
def test_lost_or_cut_outputs_are_noticed(ws, damage):
    make(ws, "data")
    damage(ws.path / "data" / "out.txt")
    with pytest.raises(MissingStage, match=r"lost or changed data/out\.txt.*01_preference_data"):
        ws.load("data")
    assert not ws.stage("data", {"a": 1}).done


def test_partial_work_is_kept_with_the_same_settings_only(ws, capsys):
    rows = ws.stage("data", {"a": 1}).dir / "rows.jsonl"
    append_jsonl(rows, [{"n": 1}])
    assert read_jsonl(ws.stage("data", {"a": 1}).dir / "rows.jsonl") == [{"n": 1}]
    assert not (ws.stage("data", {"a": 2}).dir / "rows.jsonl").exists()
    assert "unfinished work" in capsys.readouterr().out


def test_redoing_a_parent_keeps_the_stages_inside(ws):
    inner = make(ws, "online/iteration_1/generation")
    outer = make(ws, "online")
    assert outer.manifest["outputs"].keys() == {"out.txt"}
    assert not ws.stage("online", {"a": 2}).done
    assert ws.load(inner.name).fingerprint == inner.fingerprint
    assert [stage.name for stage in ws.finished()] == [inner.name]


@pytest.mark.parametrize(
    ("name", "notebook"),
    [
        ("sft", "02_sft_with_packing"),
        ("online/iteration_2/dpo", "07_online_dpo"),
        ("evaluation", "08_evaluation"),
    ],
)
def test_missing_stage_names_its_notebook(ws, name, notebook):
    with pytest.raises(MissingStage, match=f"{name}.*{notebook}.*--only {notebook[:2]}"):
        ws.stage("report", {}, [name])
    ws.stage(name, {})  # begun is not finished
    with pytest.raises(MissingStage):
        ws.load(name)


@pytest.mark.parametrize("change", [{"profile": "cpu"}, {"seed": 7}, {"version": "0.0.1"}])
def test_run_of_other_settings_is_refused(ws, change):
    write_json(ws.path / "run.json", read_json(ws.path / "run.json") | change)
    with pytest.raises(RunMismatch) as caught:
        open_run(SMOKE, ws.path)
    message = str(caught.value)
    assert str(next(iter(change.values()))) in message
    assert "run_dir" in message
    assert "delete" in message


def test_reopening_keeps_run_json(ws):
    before = read_json(ws.path / "run.json")
    open_run(SMOKE, ws.path)
    assert read_json(ws.path / "run.json") == before


def test_default_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("RLHF_GUIDE_RUNS", raising=False)
    monkeypatch.chdir(tmp_path)
    assert open_run(SMOKE).path == tmp_path / "runs" / "smoke"
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert open_run(SMOKE).path == tmp_path / "runs" / "smoke"
    assert open_run(SMOKE, "elsewhere").path == tmp_path / "elsewhere"
    monkeypatch.setenv("RLHF_GUIDE_RUNS", str(tmp_path / "parent"))
    assert open_run(SMOKE, "").path == tmp_path / "parent" / "smoke"


def test_json_lines_survive_a_cut(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"n": 1}, {"n": float("nan"), "text": "é"}])
    with open(path, "a") as target:
        target.write('{"n": 3, "te')
    assert read_jsonl(path) == [{"n": 1}, {"n": None, "text": "é"}]
    append_jsonl(path, [{"n": 4}])
    assert [row["n"] for row in read_jsonl(path)] == [1, None, 4]


def test_damaged_line_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 1}\n{"n": \n{"n": 3}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2"):
        read_jsonl(path)


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "value.json"
    write_json(path, {"n": 1})

    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(GuideError, match="disk is full"):
        write_json(path, {"n": 2})
    assert json.loads(path.read_text()) == {"n": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["value.json"]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_unwritable_folder_is_a_plain_message(tmp_path, monkeypatch, number):
    def refuse(*arguments, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(workspace.Path, "mkdir", refuse)
    with pytest.raises(GuideError, match="run_dir"):
        open_run(SMOKE, tmp_path / "run")


def test_killed_between_files_and_manifest_is_not_finished(ws):
    stage = ws.stage("data", {"a": 1})
    (stage.dir / "out.txt").write_text("all written, no manifest")
    with pytest.raises(MissingStage):
        ws.load("data")
    assert not ws.stage("data", {"a": 1}).done
