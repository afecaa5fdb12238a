"""The course on a folder of raw files: no facts are known, so rewards are reported as rewards."""

import json
import shutil
import subprocess
import sys

import pytest
from smoke_run import ROOT, start


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The report of notebooks 01 to 08 on a copy of the raw files."""
    folder = tmp_path_factory.mktemp("course")
    shutil.copytree(ROOT / "data_prep" / "embedded" / "raw", folder / "raw")
    (folder / "raw" / "capybara.jsonl").unlink()
    process = start(folder / "smoke", "01-08", ["--set", f"data_source={folder / 'raw'}"])
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    line = [sys.executable, "-m", "rlhf_guide.cli", "report", str(folder / "smoke"), "--json"]
    return json.loads(subprocess.run(line, cwd=ROOT, check=True, capture_output=True).stdout)


def test_rewards_are_reported_as_rewards_and_no_utility_is_claimed(results):
    assert {"reward_sft", "reward_online_dpo", "reward_gain_over_sft"} <= set(results["metrics"])
    assert not {"utility_sft", "instruction_pass_rate_sft"} & set(results["metrics"])


def test_every_stage_finished(results):
    for name in ("data", "sft", "reward_model", "offline_dpo", "online", "evaluation"):
        assert results["stages"][name]["status"] == "finished", name
