"""The headless runner on small notebooks: order, resume, strict parameters, plain failures."""

import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import fake_course
import nbformat
import papermill
import psutil
import pytest

from rlhf_guide import course, sources
from rlhf_guide.cli import main
from rlhf_guide.course import _totals
from rlhf_guide.errors import GuideError, NotebookFailed, ParameterError
from rlhf_guide.files import read_json, read_jsonl, write_json
from rlhf_guide.profiles import load_profile
from rlhf_guide.sources import notebook_parameters, select, source_hash
from rlhf_guide.workspace import open_run

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Kernels find the package even where it is not installed."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def run(tmp_path, **options):
    """Run the small course; returns its workspace and the printed lines."""
    lines = []
    notebooks = tmp_path / "notebooks"
    if not notebooks.exists():
        fake_course.write_course(tmp_path)
    ws = course.run_course(
        "smoke", run_dir=tmp_path / "run", notebooks=notebooks, say=lines.append, **options
    )
    return ws, lines


@pytest.mark.parametrize(("lost", "runs"), [(2, True), (3, False)])
def test_a_kernel_that_lost_its_port_is_started_again(tmp_path, monkeypatch, lost, runs):
    real, calls = papermill.execute_notebook, []

    def execute(*arguments, **options):
        calls.append(arguments)
        if len(calls) <= lost:
            raise RuntimeError("Kernel died before replying to kernel_info")
        return real(*arguments, **options)

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    if runs:
        assert "ok" in run(tmp_path, only="01")[1][0]
        return
    with pytest.raises(NotebookFailed, match=r"ended 3 times.*same command again"):
        run(tmp_path, only="01")
    assert len(calls) == lost


def steps(tmp_path):
    """What the small notebooks really did, in order."""
    path = tmp_path / "run" / "log.jsonl"
    return read_jsonl(path) if path.exists() else []


def test_run_then_skip_then_redo_what_changed(tmp_path):
    ws, lines = run(tmp_path)
    assert [line.split(" … ")[0] for line in lines] == ["01_preference_data", "02_sft_with_packing"]
    assert all(" … ok " in line and line.endswith("GiB") for line in lines)
    assert steps(tmp_path) == ["data", *(f"row {n}" for n in range(6))]
    record = read_json(ws.path / "notebooks" / "02_sft_with_packing.json")
    assert record["status"] == "ok"
    assert record["peak_gib"] > 0
    assert record["parameters"] == {"profile": "smoke"}
    assert record["stages"] == {"sft": ws.load("sft").fingerprint}

    _, lines = run(tmp_path)
    assert all("done before" in line for line in lines)

    # A new text cell changes no output; new code runs its notebook, whose stage is still done.
    path = tmp_path / "notebooks" / "02_sft_with_packing.ipynb"
    edit(path, lambda nb: nb.cells.append(nbformat.v4.new_markdown_cell("More words.")))
    assert "done before" in run(tmp_path)[1][1]
    edit(path, lambda nb: nb.cells.append(nbformat.v4.new_code_cell("1 + 1")))
    _, lines = run(tmp_path)
    assert "done before" in lines[0]
    assert "ok" in lines[1]
    assert len(steps(tmp_path)) == 7

    # A lost output of the first stage is made again, though its notebook's record says ok.
    (ws.path / "data" / "rows.jsonl").unlink()
    _, lines = run(tmp_path)
    assert " … ok " in lines[0]
    assert steps(tmp_path)[7:] == ["data"]  # the same bytes again: the second stage still stands


def edit(path, change):
    """Change a notebook file in place."""
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    nbformat.write(notebook, path)


def test_override_reaches_the_notebooks_that_take_it(tmp_path):
    ws, _ = run(tmp_path, overrides={"sft_learning_rate": 0.5}, only="01-02")
    assert ws.load("sft").manifest["config"]["learning_rate"] == 0.5
    # the same folder with another value: the stage is done again
    run(tmp_path, overrides={"sft_learning_rate": 0.25})
    assert ws.load("sft").manifest["config"]["learning_rate"] == 0.25


def test_kill_then_run_again_continues(tmp_path):
    fake_course.write_course(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wait").touch()
    command = ["-m", "rlhf_guide.cli", "run", "--profile", "smoke", "--run-dir", tmp_path / "run"]
    process = subprocess.Popen(
        [sys.executable, *map(str, command), "--notebooks", str(tmp_path / "notebooks")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: "row 2" in steps(tmp_path))
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        for victim in (process, *children):
            victim.kill()
        process.wait()
        psutil.wait_procs(children)
    assert steps(tmp_path) == ["data", "row 0", "row 1", "row 2"]
    (tmp_path / "run" / "wait").unlink()
    ws, lines = run(tmp_path)
    assert "done before" in lines[0]
    assert steps(tmp_path) == ["data", *(f"row {n}" for n in range(6))]
    assert len(read_jsonl(ws.load("sft").dir / "rows.jsonl")) == 6


def wait_for(condition, seconds=60):
    """Poll until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


def test_failing_cell_in_plain_words(tmp_path, capsys):
    broken = fake_course.notebook("values = [1]", "# look it up\nvalues[3]")
    fake_course.write_course(tmp_path, {"03_reward_model": broken})
    with pytest.raises(NotebookFailed) as caught:
        run(tmp_path, only="03")
    message = str(caught.value)
    assert "03_reward_model.ipynb stopped in cell" in message
    assert "# look it up" in message
    assert "IndexError: list index out of range" in message
    assert "same command again" in message
    assert "Traceback" not in message
    assert read_json(tmp_path / "run/notebooks/03_reward_model.json")["status"] == "failed"
    arguments = ["run", "--profile", "smoke", "--only", "03", "--run-dir", str(tmp_path / "run")]
    assert main([*arguments, "--notebooks", str(tmp_path / "notebooks")]) == 1
    assert "error: 03_reward_model.ipynb stopped" in capsys.readouterr().err


def test_notebook_run_too_early_names_the_missing_stage(tmp_path):
    with pytest.raises(NotebookFailed, match=r"MissingStage: stage 'data'.*01_preference_data"):
        run(tmp_path, only="02")


def test_dead_kernel_says_what_to_look_at(tmp_path):
    deadly = fake_course.notebook("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    fake_course.write_course(tmp_path, {"03_reward_model": deadly})
    with pytest.raises(NotebookFailed, match=r"kernel died.*memory"):
        run(tmp_path, only="03")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"overrides": {"sft_learning_rat": 1e-4}}, "'sft_learning_rate'"),
        ({"overrides": {"sft_learning_rate": "1e-4"}}, "1.0e-4"),
        ({"overrides": {"sft_learning_rate": 7.0}}, "at most 1"),
        ({"overrides": {"dpo_beta": 0.2}}, "none of the chosen notebooks takes it"),
        ({"only": "09"}, "there are 01, 02"),
        ({"only": "02-01"}, "there are 01, 02"),
        ({"only": "two"}, "there are 01, 02"),
    ],
)
def test_wrong_request_is_refused_before_a_kernel_starts(tmp_path, options, words):
    with pytest.raises(ParameterError) as caught:
        run(tmp_path, **options)
    assert words in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_one_job_of_several_takes_what_it_knows_of_the_settings(tmp_path):
    beta = fake_course.notebook("1", parameters=fake_course.PARAMETERS + "\ndpo_beta = None")
    fake_course.write_course(tmp_path, {"06_offline_dpo": beta})
    refused = "none of the chosen notebooks takes it"
    with pytest.raises(ParameterError, match=refused):
        run(tmp_path, only="01", overrides={"dpo_beta": 0.2})
    with pytest.raises(ParameterError, match=refused):
        run(tmp_path, only="01", overrides={"online_iterations": 2}, one_of_several=True)
    _, lines = run(tmp_path, only="01", overrides={"dpo_beta": 0.2}, one_of_several=True)
    assert "ok" in lines[0]


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (fake_course.PARAMETERS + "\nsft_learning_rat = None", "'sft_learning_rate'"),
        ('profile = ""\nseed = None', "run_dir"),
    ],
)
def test_wrong_parameters_cell_is_refused_before_a_kernel_starts(tmp_path, cell, words):
    wrong = fake_course.notebook("1", parameters=cell)
    fake_course.write_course(tmp_path, {"03_reward_model": wrong})
    with pytest.raises(ParameterError, match=words):
        run(tmp_path)
    assert not (tmp_path / "run").exists()


def test_second_runner_in_the_same_folder_is_refused(tmp_path):
    ws, _ = run(tmp_path, only="01")
    with course._only_runner(ws), pytest.raises(GuideError, match="another `rlhf-guide run`"):
        run(tmp_path)


def test_kernels_inherit_the_network_switches(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    probe = fake_course.notebook(
        "import os, json, pathlib\n"
        "names = ['HF_HUB_OFFLINE', 'RLHF_GUIDE_BLOCK_NETWORK', 'RLHF_GUIDE_ALLOW_DOWNLOAD']\n"
        "seen = json.dumps([os.getenv(name) for name in names])\n"
        "(pathlib.Path(run_dir) / 'seen.json').write_text(seen)"
    )
    fake_course.write_course(tmp_path, {"03_reward_model": probe})
    run(tmp_path, only="03", block_network=True)
    assert read_json(tmp_path / "run/seen.json") == ["1", "1", None]
    run(tmp_path, only="03", overrides={"allow_download": True})
    assert read_json(tmp_path / "run/seen.json") == [None, None, "1"]
    assert "HF_HUB_OFFLINE" not in os.environ


def test_command_line_settings():
    parsed = course.parse_settings(
        ["sft_learning_rate=1e-4", "sft_packing=False", "seed = 3", "dtype=float32"]
    )
    assert parsed == {
        "sft_learning_rate": 1e-4,
        "sft_packing": False,
        "seed": 3,
        "dtype": "float32",
    }
    for text, words in [("seed", "name=value"), ("sed=3", "'seed'"), ("seed=x", "whole number")]:
        with pytest.raises(ParameterError, match=words):
            course.parse_settings([text])


def test_selection():
    paths = [Path(f"{n:02d}_x.ipynb") for n in range(9)]
    assert [p.name[:2] for p in select(paths, "02-04,07")] == ["02", "03", "04", "07"]
    assert select(paths, None) == paths


def test_parameters_are_read_without_running_the_cell():
    cell = '# a comment\nprofile = ""  # "" = default\nseed: int = None\nlist = [1,\n  2]'
    assert notebook_parameters(fake_course.notebook(parameters=cell)) == ["profile", "seed", "list"]


def test_source_hash_counts_code_only():
    plain = fake_course.notebook("1 + 1")
    same = fake_course.notebook("1 + 1\n")
    same.cells.append(nbformat.v4.new_markdown_cell("text"))
    injected = nbformat.v4.new_code_cell("seed = 1", metadata={"tags": ["injected-parameters"]})
    same.cells.insert(2, injected)
    assert source_hash(plain) == source_hash(same)
    assert source_hash(plain) != source_hash(fake_course.notebook("1 + 2"))
    assert source_hash(fake_course.notebook("a", "b")) != source_hash(fake_course.notebook("ab"))


def test_no_notebooks_is_a_plain_message(tmp_path):
    with pytest.raises(GuideError, match="--notebooks"):
        sources.notebooks_dir(tmp_path)


def test_time_counts_stages_of_an_earlier_killed_run(tmp_path):
    ws, _ = run(tmp_path, only="01")
    manifest = ws.path / "data" / "manifest.json"
    write_json(manifest, {**read_json(manifest), "seconds": 5000.0, "peak_gib": 9.0})
    path = ws.path / "notebooks" / "01_preference_data.json"
    write_json(path, {**read_json(path), "status": "failed"})  # as if killed before its record
    run(tmp_path, only="01")
    record = read_json(path)
    assert 5000 < record["seconds"] < 5100
    assert record["peak_gib"] == 9.0


def test_time_counts_each_part_of_an_iteration(tmp_path):
    """An iteration's own record is written in no time; its parts are what took long."""
    ws = open_run(load_profile("smoke"), tmp_path)
    for name, seconds in (("dpo", 70.0), ("generation", 80.0), ("", 0.5)):
        stage = ws.stage(f"online/iteration_1/{name}".rstrip("/"), {}).finish({})
        write_json(stage.dir / "manifest.json", {**stage.manifest, "seconds": seconds})
    later = datetime.now(UTC) + timedelta(seconds=5)
    assert _totals(ws, "07_online_dpo", later, 10.0, 1.0)["seconds"] == 160.5
