"""Two processes train what one trains: accelerate's configurations, on gloo, in float32.

The three jobs (one process, two with DDP, two with FSDP2) start from one fork server that has
imported the libraries once; `accelerate launch` would import them again in every process.
"""

import csv
import importlib.util
import multiprocessing
import shutil
import signal
import socket

import launch_job
import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

from rlhf_guide import launch, tracking
from rlhf_guide.errors import GuideError, ParameterError
from rlhf_guide.profiles import load_profile

STRATEGIES = ("ddp", "fsdp2")

pytestmark = pytest.mark.timeout(600)


def launcher_arguments(name, processes):
    """What `accelerate launch --config_file ... --num_processes ...` makes of its arguments."""
    command = ["--config_file", str(launch.CONFIGS / f"{name}.yaml")]
    parser = launch_command_parser()
    given = parser.parse_args([*command, "--num_processes", str(processes), "job.py"])
    return _validate_launch_command(given)[0]


def launcher_environment(name):
    """The variables that `accelerate launch` sets for its processes."""
    found = prepare_multi_gpu_env(launcher_arguments(name, 2))
    return {key: value for key, value in found.items() if key.startswith(("ACCELERATE_", "FSDP_"))}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Folder of the runs trained by one process, by two with DDP and by two with FSDP2."""
    folder = tmp_path_factory.mktemp("runs")
    launch_job.prepare(folder / "one")
    for name in STRATEGIES:
        shutil.copytree(folder / "one", folder / name)
    start_processes(folder / "one", [{}])
    for name in STRATEGIES:
        start_processes(folder / name, group_of_two(launcher_environment(name)))
    return folder


def start_processes(folder, environments):
    """Run the job in one process for each environment, and wait until all have succeeded."""
    members = members_of("member", [(each, folder) for each in environments])
    assert [each.exitcode for each in members] == [0] * len(members)


def members_of(name, arguments):
    """Processes that have run a function of `launch_job`, one for each tuple of arguments."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["launch_job"])
    members = [context.Process(target=getattr(launch_job, name), args=each) for each in arguments]
    for each in members:
        each.start()
    for each in members:
        each.join()
    return members


def group_of_two(environment):
    """What tells two processes of one group who they are and where they meet."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = {**environment, **meeting, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [{**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]


def rows_of(table):
    """The rows of a CSV file, as texts."""
    with table.open(encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("place", launch_job.STAGES)
def test_two_processes_have_the_losses_of_one(results, strategy, place):
    alone, shared = (
        [float(row["loss"]) for row in rows_of(results / how / place / "history.csv")]
        for how in ("one", strategy)
    )
    assert len(alone) >= 3
    assert alone[0] - alone[-1] > 5e-3, "nothing was learnt, so nothing is compared"
    assert shared == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("place", launch_job.STAGES)
def test_one_whole_model_is_saved_and_nothing_else(results, strategy, place):
    """Adapters merged, shards gathered, checkpoints and shared rows gone."""
    alone, shared = (results / how / place for how in ("one", strategy))
    names = [sorted(str(p.relative_to(top)) for p in top.rglob("*")) for top in (alone, shared)]
    assert names[0] == names[1]
    (file,) = alone.rglob("*.safetensors")
    expected, found = load_file(file), load_file(shared / file.relative_to(alone))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert (found[name] - weight).abs().max() < 1e-4, name


def test_a_trained_stage_is_read_and_not_trained_again(results):
    written = [results / "ddp" / place / "history.csv" for place in launch_job.STAGES]
    before = [path.stat().st_mtime_ns for path in written]
    launch_job.run(results / "ddp")
    assert [path.stat().st_mtime_ns for path in written] == before


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_accelerate_reads_the_configurations(name):
    found = launcher_arguments(name, 4)
    assert found.num_processes == 4
    assert found.mixed_precision == "no", "the profile decides"
    assert found.use_deepspeed == name.startswith("zero")
    if found.use_deepspeed:
        assert found.zero_stage == int(name[-1])
        assert found.gradient_accumulation_steps is None, "the profile decides"
    else:
        assert found.use_fsdp == (name == "fsdp2")
        assert not found.use_fsdp or found.fsdp_version == 2


def test_configurations_are_found_by_name(monkeypatch):
    assert launch.config_path("ddp").is_file()
    with pytest.raises(ParameterError, match="ddp, fsdp2, zero2, zero3"):
        launch.config_path("fsdp")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ParameterError, match=r"rlhf-guide\[scale\]"):
        launch.config_path("zero3")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ParameterError, match=r"4 processes .* 2 GPU\(s\).* --num_processes 2"):
        launch._check_devices(2)
    launch._check_devices(4)
    launch._check_devices(0)  # CPUs


def test_a_batch_that_cannot_be_divided_is_refused_before_anything_is_opened(monkeypatch, capsys):
    def never(_):
        raise AssertionError("opened")

    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit) as stopped:
        launch.main("sft", never, never, ["--profile", "paper"])
    assert stopped.value.code == 1
    assert "a number of processes that divides 32" in capsys.readouterr().err


def test_a_model_that_does_not_fit_is_refused_before_anything_is_opened(monkeypatch, capsys):
    def never(_):
        raise AssertionError("opened")

    monkeypatch.setattr(launch, "_gpu_memory", lambda: 80e9)
    with pytest.raises(SystemExit):
        launch.main("sft", never, never, ["--profile", "paper"])
    assert "sft does not fit: 128 GB a device, 80 GB" in capsys.readouterr().err
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    assert launch.require_memory(load_profile("paper"), "sft", 80e9) == "", "kept elsewhere"


def test_what_is_only_estimated_is_a_warning(monkeypatch):
    paper = load_profile("paper")
    assert launch.require_memory(paper, "sft", 0) == "", "without a GPU nothing is known"
    for name, value in {**launcher_environment("fsdp2"), "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert launch.require_memory(paper, "reward_model", 80e9) == ""
    assert "sft does not fit" in launch.require_memory(paper, "sft", 25e9)
    with pytest.raises(GuideError, match="16 GB a device, 15 GB usable"):
        launch.require_memory(paper, "sft", 15e9)


def test_a_lost_process_is_named_with_the_way_on(tmp_path):
    """Of two processes that wait for each other one is killed; the other must say what to do."""
    said = tmp_path / "said.txt"
    members = members_of("lose_one", [(each, said) for each in group_of_two({})])
    assert [each.exitcode for each in members] == [1, -signal.SIGKILL]
    assert "error (process 0): the connection to another process" in said.read_text()


@pytest.mark.parametrize("tracker", ["trackio", "tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused(tracker, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ParameterError, match=f"pip install {tracker}"):
        tracking.report_to(tracker)
    assert tracking.report_to("none") == "none"


def test_table_and_plot_are_always_kept(tmp_path):
    history = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0, "grad_norm": 0.5}]
    table, plot = tracking.write_history(tmp_path, history, "sft")
    as_stored = [dict(sorted(row.items())) for row in history]  # what a resumed stage reads back
    before = table.read_bytes()
    assert tracking.write_history(tmp_path, as_stored, "sft")[0].read_bytes() == before
    rows = rows_of(table)
    assert rows[1] == {"step": "2", "loss": "2.0", "grad_norm": "0.5"}
    assert rows[0]["grad_norm"] == ""
    assert plot.stat().st_size > 1000
