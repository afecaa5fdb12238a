"""Slurm's files without Slurm: a fake sbatch, srun and launcher record what they are told."""

import os
import shutil
import stat
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

import rlhf_guide
from rlhf_guide import cli
from rlhf_guide.profiles import load_profile

FOLDER = Path(rlhf_guide.__file__).parent / "slurm"
FILES = sorted(FOLDER.iterdir())
ARGUMENTS = ["--profile", "paper", "--run-dir", "runs/a b"]
ITERATIONS = load_profile("paper").online.iterations

RECORD = '#!/bin/bash\nprintf "%s|" "$(basename "$0")" "$@" >> "$LOG"\necho >> "$LOG"\n'
FAKES = {
    "sbatch": RECORD + 'wc -l < "$LOG"\n[ "$(wc -l < "$LOG")" != "$FAIL_AT" ]\n',
    "srun": '#!/bin/bash\nSLURM_NODEID=1 exec "$@"\n',
    "scontrol": "#!/bin/bash\necho node1\nsleep 0.1\necho node2\n",
    "accelerate": RECORD,
    "python": RECORD,
    "rlhf-guide": RECORD + 'echo "config of $2"\n',
}


@pytest.fixture
def run(tmp_path):
    """Run one of the files with fakes before everything else; returns the recorded calls."""
    for name, text in FAKES.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(stat.S_IRWXU)
    log = tmp_path / "log"

    def start(file, *arguments, code=0, **variables):
        log.write_text("")
        environment = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "LOG": str(log),
            "FAIL_AT": "0",
            **variables,
        }
        done = subprocess.run(
            ["bash", str(FOLDER / file), *arguments],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stderr
        return [line.split("|")[:-1] for line in log.read_text().splitlines()]

    return start


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_are_valid_shell(path):
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    found = subprocess.run(["shellcheck", *map(str, FILES)], capture_output=True, text=True)
    assert not found.returncode, found.stdout


def test_the_driver_chains_every_stage_to_the_one_before(run):
    calls = run("submit.sh", *ARGUMENTS, NODES="2", TASKS="4")
    assert [words(call)[0] for call in calls] == [
        "notebooks",
        *["training", "notebooks"] * 3,
        "training",
        *["generation", "collect", "generation", "collect", "training"] * ITERATIONS,
        "notebooks",
    ]
    trained = [words(call)[1] for call in calls if words(call)[0] == "training"]
    online = ["online_stages"] * ITERATIONS
    assert trained == ["sft", "reward_model", "preference_model", "dpo", *online]
    for number, call in enumerate(calls):
        after = [a for a in call if a.startswith("--dependency")]
        assert after == ([f"--dependency=afterok:{number}"] if number else [])
        assert call[call.index("--profile") :][:4] == ARGUMENTS
        assert ("--nodes=2" in call) == (words(call)[0] == "training")
        assert ("--array=0-3" in call) == (words(call)[0] == "generation")


def test_settings_reach_every_job_and_refuse_none(run):
    setting = ["--set", "dpo_beta=0.05"]
    for call in run("submit.sh", *ARGUMENTS, *setting):
        file, *arguments = words(call)
        assert setting == arguments[arguments.index("--set") :][:2]
        if file == "notebooks":  # chapter 03, say, does not take it
            assert cli._parser().parse_args(["run", *arguments]).one_of_several


def test_each_iteration_draws_scores_and_trains_in_this_order(run):
    calls = [words(call) for call in run("submit.sh", *ARGUMENTS)][-5 * ITERATIONS - 1 : -1]
    steps = [
        ("generation", "generation"),
        ("collect", "generation"),
        ("generation", "annotation"),
        ("collect", "annotation"),
        ("training", "online_stages"),
    ]
    assert [call[:4] for call in calls] == [
        [*step, "--iteration", str(t)] for t in range(1, ITERATIONS + 1) for step in steps
    ]


def words(call):
    """What a submitted job runs: the name of its file, and the file's arguments."""
    place = next(i for i, word in enumerate(call) if word.endswith(".sbatch"))
    return [Path(call[place]).stem, *call[place + 1 :]]


def test_the_driver_stops_when_a_job_is_refused(run):
    assert len(run("submit.sh", *ARGUMENTS, code=1, FAIL_AT="3")) == 3


@pytest.mark.parametrize("first", [0, 1])
def test_the_array_covers_every_shard_once(run, first):
    shards = [
        run(
            "generation.sbatch",
            "generation",
            *ARGUMENTS,
            SLURM_ARRAY_TASK_ID=str(first + k),
            SLURM_ARRAY_TASK_MIN=str(first),
            SLURM_ARRAY_TASK_COUNT="3",
        )[0]
        for k in range(3)
    ]
    assert [call[-1] for call in shards] == ["0/3", "1/3", "2/3"]
    assert shards[0][:4] == ["python", "-m", "rlhf_guide.distributed", "generation"]
    assert shards[0][4:-1] == [*ARGUMENTS, "--shard"]


def test_a_job_without_an_array_is_refused(run):
    assert run("generation.sbatch", "generation", code=1) == []


def test_collecting_finishes_the_stage_of_the_array(run):
    (call,) = run("collect.sbatch", "annotation", *ARGUMENTS)
    module = ["python", "-m", "rlhf_guide.distributed"]
    assert call == [*module, "annotation", *ARGUMENTS, "--collect"]


def test_two_nodes_start_sixteen_processes_with_the_first_as_meeting_point(run):
    calls = run(
        "training.sbatch",
        "sft",
        *ARGUMENTS,
        SLURM_JOB_NODELIST="node[1-2]",
        SLURM_NNODES="2",
        SLURM_GPUS_ON_NODE="8",
    )
    assert calls[0] == ["rlhf-guide", "config", "fsdp2"]
    launch = calls[1]
    given = dict(pairwise(launch))
    assert given["--num_machines"] == "2"
    assert given["--num_processes"] == "16"
    assert given["--machine_rank"] == "1"
    assert given["--main_process_ip"] == "node1"
    assert given["--config_file"] == "config of fsdp2"
    assert launch[-5:] == ["rlhf_guide.sft", *ARGUMENTS]
