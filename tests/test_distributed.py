"""Pieces on many devices give the rows of one process, whoever dies on the way."""

import os
import shutil
import signal
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest

from rlhf_guide import distributed, generation, online_stages
from rlhf_guide.annotation import annotate
from rlhf_guide.errors import GuideError, ParameterError
from rlhf_guide.files import read_jsonl
from rlhf_guide.models import load_tokenizer, resolve_model, save_model
from rlhf_guide.profiles import load_profile
from rlhf_guide.reward_model import RewardScorer, new_reward_model
from rlhf_guide.workspace import open_run, write_jsonl

SETTINGS = replace(load_profile("smoke").generation, max_new_tokens=8, batch_size=6)
TEMPERATURES = (1.0, 1.0, 0.7)
PROMPTS = [
    {
        "prompt_id": f"p{i}",
        "messages": [{"role": "user", "content": "tell " * (1 + (i * 7) % 5) + str(i)}],
        "source": "test",
        **({"facts": [[str(i)], []]} if i % 2 else {}),  # not every row has every field
    }
    for i in range(9)
]


@pytest.fixture(scope="module")
def tiny():
    return resolve_model("random-tiny-llama")


@pytest.fixture(scope="module")
def job(tiny):
    return distributed.GenerationJob(str(tiny), SETTINGS, TEMPERATURES, 1, "float32")


@pytest.fixture(scope="module")
def single(tiny, tmp_path_factory):
    """The file of the single-process path."""
    path = tmp_path_factory.mktemp("single") / "out.jsonl"
    generation.generate(tiny, PROMPTS, SETTINGS, TEMPERATURES, 1, path, "float32", progress=False)
    return path


def test_shards_give_the_file_of_one_process_and_finished_pieces_are_kept(job, single, tmp_path):
    out = tmp_path / "out.jsonl"
    pieces = job.pieces(PROMPTS)
    shares = [distributed.run_shard(job, PROMPTS, out, shard, 2) for shard in (1, 0)]
    assert sum(shares) == len(pieces) == 5
    assert distributed.run_shard(job, PROMPTS, out, 0, 2) == 0
    assert distributed.collect(pieces, PROMPTS, out) == read_jsonl(single)
    assert out.read_bytes() == single.read_bytes()
    assert not distributed.pieces_folder(out).exists()


def test_missing_pieces_are_counted_and_none_is_invented(job, tmp_path):
    out = tmp_path / "out.jsonl"
    distributed.run_shard(job, PROMPTS, out, 0, 5)
    with pytest.raises(GuideError, match="4 of 5 pieces"):
        distributed.collect(job.pieces(PROMPTS), PROMPTS, out)
    assert not out.exists()


@pytest.mark.parametrize("change", [{"seed": 2}, {"temperatures": (1.0, 0.7, 0.7)}])
def test_pieces_of_other_settings_are_not_taken(job, change):
    def names(job):
        return {piece.name for piece in job.pieces(PROMPTS)}

    assert names(job) == names(replace(job))
    assert not names(job) & names(replace(job, **change))


@pytest.fixture
def online_run(tiny, tmp_path):
    """A run with what the first iteration reads: prompts, a policy and a reward model."""
    ws = open_run(load_profile("smoke"), tmp_path / "run")
    data = ws.stage("data", {})
    write_jsonl(data.dir / "prompts_online_1.jsonl", PROMPTS)
    data.finish()
    sft = ws.stage("sft", {}, ["data"])
    shutil.copytree(tiny, sft.dir / "model")
    sft.finish()
    reward = ws.stage("reward_model", {}, ["data"])
    save_model(new_reward_model(tiny), load_tokenizer(tiny), reward.dir / "model")
    reward.finish()
    return ws


def test_an_array_and_its_collection_finish_an_iteration_s_stages(online_run, capsys, monkeypatch):
    """What Slurm's driver starts, a lost task in between; notebook 07 finds nothing to do."""

    def command(stage, *how):
        numbers = ["--set", "generation_batch_size=4", "--set", "generation_max_new_tokens=8"]
        options = ["--profile", "smoke", "--run-dir", str(online_run.path), *numbers, *how]
        code = distributed.main([stage, *options])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    def never():
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("rlhf_guide.notebook.quieten", lambda: None)
    monkeypatch.setattr("rlhf_guide.notebook.stay_offline", lambda allowed: None)
    assert command("annotation", "--shard", "0/1")[0] == 1, "there are no answers yet"
    assert command("generation", "--shard", "0/2")[0] == 0
    code, said = command("generation", "--collect")
    assert code == 1
    assert "2 of 4 pieces are not done yet" in said
    assert command("generation", "--shard", "1/2")[0] == 0
    assert command("generation", "--collect")[0] == 0
    assert command("annotation", "--shard", "0/1")[0] == 0
    assert "4 prompts" in command("annotation", "--collect")[1]
    assert "nothing to do" in command("annotation", "--collect")[1]
    numbers = {"generation_batch_size": 4, "generation_max_new_tokens": 8}
    profile = load_profile("smoke", **numbers)
    assert online_stages.sample_answers(online_run, 1, profile).metrics["responses"] == 16
    scored = online_stages.score_answers(online_run, 1, profile, never)
    assert scored.metrics["fewer_answers"] == 0


def test_wrong_shards_are_refused(job, tmp_path):
    with pytest.raises(ParameterError, match="0 to 1"):
        distributed.run_shard(job, PROMPTS, tmp_path / "out.jsonl", 2, 2)
    with pytest.raises(ParameterError, match="0/8"):
        distributed._shard("3")


def test_more_actors_than_devices_are_refused():
    assert distributed._placement({"CPU": 16, "GPU": 8}, None) == ({"num_gpus": 1}, 8)
    with pytest.raises(ParameterError, match=r"9 actors .* 8 GPU"):
        distributed._placement({"CPU": 16, "GPU": 8}, 9)


def test_a_missing_ray_is_named(job, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GuideError, match=r"rlhf-guide\[scale\]"):
        distributed.run(job, PROMPTS, tmp_path / "out.jsonl", 2)
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()


class SlowRay:
    """Ray whose first starts take too long."""

    def __init__(self, failures, reason="The current node timed out during startup."):
        self.failures, self.reason, self.calls = failures, reason, []

    def init(self, **options):
        self.calls.append(options)
        if len(self.calls) <= self.failures:
            raise Exception(self.reason)

    def shutdown(self):
        self.calls.append("shutdown")


def test_ray_gets_further_tries_to_start():
    ray = SlowRay(failures=1)
    distributed._start(ray, num_cpus=2)
    assert ray.calls == [{"num_cpus": 2}, "shutdown", {"num_cpus": 2}]


def test_ray_that_never_starts_is_named():
    with pytest.raises(GuideError, match=r"did not start[\s\S]*--shard"):
        distributed._start(SlowRay(failures=99))


def test_another_fault_of_ray_is_not_hidden():
    ray = SlowRay(failures=99, reason="no such address")
    with pytest.raises(Exception, match="no such address"):
        distributed._start(ray)
    assert len(ray.calls) == 1


@pytest.fixture(scope="module")
def cluster():
    """Two CPUs on the loopback address, for all tests that need Ray."""
    paths = [str(Path(distributed.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    ray, _ = distributed._join_cluster(2)
    yield ray
    ray.shutdown()


@pytest.mark.timeout(300)  # processes start slowly on a busy machine
def test_an_actor_killed_in_mid_job_loses_nothing(cluster, job, single, tmp_path):
    marker, out = tmp_path / "killed", tmp_path / "out.jsonl"

    @dataclass(frozen=True)
    class Mortal(distributed.GenerationJob):
        """Its worker is killed at the second piece, once."""

        marker: str = ""

        def open(self):
            work, seen = super().open(), []

            def fatal(rows):
                seen.append(rows)
                if len(seen) == 2 and not os.path.exists(self.marker):
                    open(self.marker, "w").close()
                    os.kill(os.getpid(), signal.SIGKILL)
                return work(rows)

            return fatal

    mortal = Mortal(**asdict(job) | {"settings": SETTINGS}, marker=str(marker))
    rows = distributed.run(mortal, PROMPTS, out, 2)
    assert marker.exists(), "no actor was killed: the test proves nothing"
    assert rows == read_jsonl(single)
    assert out.read_bytes() == single.read_bytes()


@pytest.mark.timeout(300)  # processes start slowly on a busy machine
def test_rewards_of_actors_are_those_of_one_process(cluster, tiny, single, tmp_path):
    folder = tmp_path / "reward"
    model = new_reward_model(tiny)
    model.score.weight.data.normal_()
    save_model(model, load_tokenizer(tiny), folder)
    rows = [
        {**row, "prompt_id": f"{k}-{row['prompt_id']}"}
        for k in range(8)
        for row in read_jsonl(single)
    ]
    here = annotate(rows, RewardScorer(folder, "float32"), tmp_path / "here.jsonl")
    there = distributed.annotate(rows, folder, tmp_path / "there.jsonl", "float32", actors=2)
    assert there == here
    assert (tmp_path / "there.jsonl").read_bytes() == (tmp_path / "here.jsonl").read_bytes()


@pytest.mark.timeout(300)  # processes start slowly on a busy machine
def test_a_failing_piece_stops_the_job_in_plain_words(cluster, job, tmp_path):
    broken = replace(job, settings=replace(SETTINGS, max_new_tokens=100_000))
    with pytest.raises(GuideError, match=r"5 of 5 pieces left[\s\S]*lower the number"):
        distributed.run(broken, PROMPTS, tmp_path / "out.jsonl", 1)
