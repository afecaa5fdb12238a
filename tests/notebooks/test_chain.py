"""The whole course, headless, at the smoke profile, with the network blocked."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
METRICS = {
    "reward_model_accuracy",
    "reward_model_length_baseline",
    "preference_model_accuracy",
    "utility_sft",
    "utility_offline_dpo",
    "utility_online_dpo",
    "utility_gain_over_sft",
    "utility_gain_over_offline",
    "instruction_pass_rate_sft",
    "instruction_pass_rate_online",
}

pytestmark = [pytest.mark.chain, pytest.mark.timeout(1500)]


# Stands in for a reader's tokens: whatever a run writes must not hold it.
SECRET = "token-0f1e2d3c4b5a"
TOKENS = dict.fromkeys(["HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY"], SECRET)


def environment():
    """This process's, as a reader's shell would have it: kernels choose their own plotting."""
    kept = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    return {**kept, **TOKENS, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def command(*arguments):
    """The runner as a reader's command line would start it; its standard output."""
    line = [sys.executable, "-m", "rlhf_guide.cli", *map(str, arguments)]
    done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished smoke run: its folder and what the runner printed."""
    folder = tmp_path_factory.mktemp("course") / "smoke"
    printed = command("run", "--profile", "smoke", "--no-network", "--run-dir", folder)
    return folder, printed


@pytest.fixture(scope="module")
def results(run):
    return json.loads(command("report", run[0], "--json"))


def test_one_line_of_progress_for_each_notebook(run):
    assert len(NOTEBOOKS) == 13
    for path in NOTEBOOKS:
        assert re.search(rf"^{path.stem} … ok ", run[1], re.MULTILINE)


def test_report_has_the_documented_shape(results):
    assert set(results) == {"profile", "seconds", "peak_gib", "stages", "metrics"}
    assert results["profile"] == "smoke"
    assert results["seconds"] > 0
    assert results["peak_gib"] > 0
    for name, row in results["stages"].items():
        assert set(row) == {"seconds", "peak_gib", "status"}, name
        assert row["status"] == "finished", name


def test_every_metric_is_there_with_its_interval(results):
    assert set(results["metrics"]) >= METRICS
    for name in METRICS:
        metric = results["metrics"][name]
        assert set(metric) == {"value", "low", "high", "n"}, name
        assert metric["n"] > 0, name
        assert metric["low"] <= metric["value"] <= metric["high"], name


def test_report_writes_one_page_that_loads_nothing(run, results):
    page = (run[0] / "report.html").read_text(encoding="utf-8")
    assert "<img" in page or "<svg" in page
    assert not re.search(r"(src|href)=\"?https?:", page)


def test_a_second_run_repeats_nothing(run):
    again = command("run", "--profile", "smoke", "--no-network", "--run-dir", run[0])
    for path in NOTEBOOKS:
        assert re.search(rf"^{path.stem} … done before ", again, re.MULTILINE)


def test_nothing_that_the_run_wrote_holds_a_token_or_a_pickle(run, results):
    files = [path for path in run[0].rglob("*") if path.is_file()]
    assert (run[0] / "report.html") in files
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert [path for path in files if path.suffix == ".safetensors"]
