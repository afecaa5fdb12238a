"""Notebook 01 through plain papermill, on a folder of raw files as `data_source`.

What follows from there on such data is in `tests/slow/test_folder_course.py`.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RAW = ROOT / "data_prep" / "embedded" / "raw"
NOTEBOOK = ROOT / "notebooks" / "01_preference_data.ipynb"

pytestmark = [pytest.mark.chain, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run folder of notebook 01 on raw files from which one source was taken away."""
    folder = tmp_path_factory.mktemp("course")
    shutil.copytree(RAW, folder / "raw")
    (folder / "raw" / "capybara.jsonl").unlink()
    given = {"profile": "smoke", "run_dir": folder / "run", "data_source": folder / "raw"}
    line = [sys.executable, "-m", "papermill", str(NOTEBOOK), str(folder / "out.ipynb")]
    line += [part for name, value in given.items() for part in ("-p", name, str(value))]
    line += ["--cwd", str(NOTEBOOK.parent), "--no-progress-bar"]
    kept = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    blocked = {"RLHF_GUIDE_BLOCK_NETWORK": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, env=kept | blocked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def rows(folder, table):
    text = (folder / "data" / f"{table}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_a_missing_source_is_named_and_the_others_are_all_there(run):
    report = json.loads((run / "data" / "report.json").read_text(encoding="utf-8"))
    assert report["missing"] == ["capybara"]
    pairs = rows(run, "preference_train") + rows(run, "preference_heldout")
    assert len({row["source"] for row in pairs}) == 9
    assert all("facts" not in row for row in rows(run, "prompts_evaluation"))


def test_the_splits_share_no_prompt(run):
    train, held_out = (
        {json.dumps(row["chosen"][:-1]) for row in rows(run, f"preference_{side}")}
        for side in ("train", "heldout")
    )
    evaluation = {json.dumps(row["messages"]) for row in rows(run, "prompts_evaluation")}
    taught = {json.dumps(row["messages"][:-1]) for row in rows(run, "sft")}
    assert train
    assert held_out
    assert train.isdisjoint(held_out)
    assert evaluation.isdisjoint(train | held_out | taught)
