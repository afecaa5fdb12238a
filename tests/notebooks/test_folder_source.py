"""The whole course, headless, at the smoke profile, on a folder of raw files as `data_source`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RAW = ROOT / "data_prep" / "embedded" / "raw"

pytestmark = [pytest.mark.chain, pytest.mark.timeout(1500)]


def command(*arguments):
    """The runner as a reader's command line would start it; its standard output."""
    line = [sys.executable, "-m", "rlhf_guide.cli", *map(str, arguments)]
    kept = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    environment = {**kept, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished smoke run on a copy of the raw files from which one source was taken away."""
    raw = tmp_path_factory.mktemp("raw") / "mine"
    shutil.copytree(RAW, raw)
    (raw / "capybara.jsonl").unlink()
    folder = tmp_path_factory.mktemp("course") / "smoke"
    given = ["--profile", "smoke", "--no-network", "--run-dir", folder]
    command("run", *given, "--only", "01-08", "--set", f"data_source={raw}")
    return folder


def rows(folder, table):
    text = (folder / "data" / f"{table}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_chain_trained_on_the_folder_and_reports_rewards_as_rewards(run):
    results = json.loads(command("report", run, "--json"))
    assert {"reward_sft", "reward_online_dpo", "reward_gain_over_sft"} <= set(results["metrics"])
    assert not {"utility_sft", "instruction_pass_rate_sft"} & set(results["metrics"])
    for name in ("data", "sft", "reward_model", "offline_dpo", "online", "evaluation"):
        assert results["stages"][name]["status"] == "finished", name


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
