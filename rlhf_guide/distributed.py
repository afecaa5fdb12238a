"""Generation and annotation on many devices: the work in pieces, any of which runs anywhere.

    rows = generate(model, prompts, settings, temperatures, seed, "out.jsonl", actors=8)

    python -m rlhf_guide.distributed generation --profile paper --iteration 1 --actors 8
    python -m rlhf_guide.distributed generation --profile paper --iteration 1 --shard 3/64
    python -m rlhf_guide.distributed generation --profile paper --iteration 1 --collect

A piece is one batch of the single-process path, so both give the same rows, bit for bit where
devices and threads are alike: a seed belongs to its request, not to a place or an order. Actors of
a Ray Data job, each with its own engine or scorer, take the pieces as they come; an actor that dies
is restarted and its piece done again. The tasks of a job array (`--shard`) need no Ray. Every piece
is a Parquet file, named by the hash of what it is made from and written atomically, so a killed
job goes on where it stopped. At the end the rows go into the one file that the notebook expects,
and the stage is finished: with Ray by the job itself, after an array by `--collect`.
"""

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm
from transformers import AutoConfig

from rlhf_guide import generation, vllm_backend
from rlhf_guide.annotation import CHUNK
from rlhf_guide.annotation import annotate as annotate_here
from rlhf_guide.chat import stop_token_ids
from rlhf_guide.errors import DataError, GuideError, ParameterError
from rlhf_guide.files import canonical_hash, plain_disk_errors, write_jsonl
from rlhf_guide.machine import usable_cores
from rlhf_guide.models import (
    choose_device,
    load_policy,
    load_tokenizer,
    save_model,
    weights_hash,
)
from rlhf_guide.settings import Generation

Row = dict[str, Any]
Work = Callable[[list[Row]], list[Row]]

STARTS = 3  # of Ray itself, on a busy machine
RESTARTS = 10  # of one actor: a lost node comes back, an engine that never fits does not
OBJECT_STORE = 200 * 2**20  # bytes; Ray's own choice is a third of the memory

INSTALL = (
    "Ray is not installed: `pip install 'rlhf-guide[scale]'`, or let the tasks of a job array do "
    "the pieces (`python -m rlhf_guide.distributed generation --shard 0/8 ...`), which need no Ray."
)


@dataclass(frozen=True)
class Piece:
    """Rows that one worker handles together; `name` is the file of its results."""

    name: str
    rows: list[Row]


@dataclass(frozen=True)
class GenerationJob:
    """Everything that a worker needs to draw answers; the fields are those of `generate`."""

    model: str
    settings: Generation
    temperatures: tuple[float, ...]
    seed: int
    dtype: str = "auto"
    adapter: str | None = None

    def pieces(self, prompts: Sequence[Row]) -> list[Piece]:
        """The batches of the single-process path, in its order (longest prompts first)."""
        generation.check_prompts(prompts, self.temperatures)
        tokenizer = load_tokenizer(self.model)
        requests = [self.request(tokenizer, prompt) for prompt in prompts]
        plan = generation.plan_batches(requests, self.settings.batch_size)
        about = [asdict(self), [weights_hash(p) for p in (self.model, self.adapter) if p]]
        return [_piece(about, [prompts[i] for i in batch]) for batch in plan]

    def request(self, tokenizer: Any, prompt: Row) -> Any:
        """One prompt's tokens with the temperature and seed of each answer."""
        return generation.new_request(tokenizer, prompt, self.temperatures, self.seed)

    def open(self) -> Work:
        """Load the engine; returns the function that turns a piece's prompts into rows."""
        tokenizer = load_tokenizer(self.model)
        vllm = self.settings.backend == "vllm"
        sample = _vllm_engine(self, tokenizer) if vllm else _transformers_engine(self, tokenizer)
        name = generation.policy_name(self.model, self.adapter)

        def work(prompts: list[Row]) -> list[Row]:
            requests = [self.request(tokenizer, prompt) for prompt in prompts]
            return [
                {
                    **prompt,
                    "responses": generation.as_responses(tokenizer, request, answers),
                    "model": name,
                }
                for prompt, request, answers in zip(
                    prompts, requests, sample(requests), strict=True
                )
            ]

        return work


@dataclass(frozen=True)
class AnnotationJob:
    """Everything that a worker needs to score answers; the fields are those of `annotate`."""

    reward_model: str
    dtype: str = "auto"
    max_length: int = 4096

    def pieces(self, generations: Sequence[Row]) -> list[Piece]:
        """The chunks of the single-process path."""
        ids = [row["prompt_id"] for row in generations]
        if len(set(ids)) < len(ids):
            raise DataError("a prompt_id stands twice among the generations: make ids unique.")
        about = [asdict(self), weights_hash(self.reward_model)]
        starts = range(0, len(generations), CHUNK)
        return [_piece(about, list(generations[i : i + CHUNK])) for i in starts]

    def open(self) -> Work:
        """Load the scorer; returns the function that adds rewards to a piece's rows."""
        from rlhf_guide.reward_model import RewardScorer  # TRL's import is slow, engines need none

        scorer = RewardScorer(self.reward_model, self.dtype, self.max_length)

        def work(rows: list[Row]) -> list[Row]:
            with tempfile.TemporaryDirectory() as scratch:
                return annotate_here(rows, scorer, Path(scratch) / "rows.jsonl")

        return work


Job = GenerationJob | AnnotationJob


def generate(
    model_path: str | Path,
    prompts: Sequence[Row],
    settings: Generation,
    temperatures: Sequence[float],
    seed: int,
    out_path: str | Path,
    dtype: str = "auto",
    adapter: str | Path | None = None,
    actors: int | None = None,
) -> list[Row]:
    """The rows of `generation.generate`, drawn by Ray actors with one engine each (paper §3.3).

    `actors` is by default one for every GPU of the cluster, or one for every CPU core. Raises
    GuideError where Ray is missing, ParameterError for more actors than devices.
    """
    job = GenerationJob(
        str(model_path),
        settings,
        tuple(map(float, temperatures)),
        seed,
        dtype,
        str(adapter) if adapter else None,
    )
    return run(job, prompts, out_path, actors)


def annotate(
    generations: Sequence[Row],
    reward_model: str | Path,
    out_path: str | Path,
    dtype: str = "auto",
    max_length: int = 4096,
    actors: int | None = None,
) -> list[Row]:
    """The rows of `annotation.annotate`, scored by Ray actors with one reward model each.

    `max_length` is in tokens. Raises as `generate` does, and DataError for a bad reward.
    """
    return run(AnnotationJob(str(reward_model), dtype, max_length), generations, out_path, actors)


def run(job: Job, rows: Sequence[Row], out_path: str | Path, actors: int | None) -> list[Row]:
    """Do the pieces that are not done, with Ray; then write and return all rows in order."""
    pieces = job.pieces(rows)
    folder = pieces_folder(out_path)
    if todo := _missing(pieces, folder):
        _run_actors(job, todo, folder, actors)
    return collect(pieces, rows, out_path)


def run_shard(job: Job, rows: Sequence[Row], out_path: str | Path, shard: int, of: int) -> int:
    """Do every `of`-th piece from `shard` on in this process; returns how many were left to do.

    No piece is dropped by rounding: the shards differ by one piece at most.
    """
    if not 0 <= shard < of:
        raise ParameterError(f"shard {shard}/{of}: count shards from 0 to {of - 1}.")
    folder = pieces_folder(out_path)
    todo = _missing(job.pieces(rows)[shard::of], folder)
    if todo:
        work = job.open()
        for piece in tqdm(todo, desc=f"shard {shard}/{of}", file=sys.stdout):
            write_piece(folder / piece.name, work(piece.rows))
    return len(todo)


def collect(pieces: Sequence[Piece], rows: Sequence[Row], out_path: str | Path) -> list[Row]:
    """Join the pieces' rows in the order of `rows`, write them, and remove the pieces.

    Raises GuideError when pieces are missing, with their number.
    """
    folder = pieces_folder(out_path)
    if missing := _missing(pieces, folder):
        raise GuideError(
            f"{len(missing)} of {len(pieces)} pieces are not done yet in {folder.name}: give the "
            "same command again for the shards that failed."
        )
    found = {row["prompt_id"]: row for piece in pieces for row in read_piece(folder / piece.name)}
    ordered = [found[row["prompt_id"]] for row in rows]
    write_jsonl(out_path, ordered)
    shutil.rmtree(folder, ignore_errors=True)
    return ordered


def pieces_folder(out_path: str | Path) -> Path:
    """Where the pieces of a result lie until it is complete: beside it."""
    return Path(out_path).with_suffix(".pieces")


def write_piece(path: Path, rows: Sequence[Row]) -> None:
    """Write one piece atomically. A row is kept as JSON, so that reading gives back the same.

    (Parquet's own columns would turn a field that some rows lack into a null in all.)
    """
    table = pa.table(
        {
            "prompt_id": [row["prompt_id"] for row in rows],
            "row": [json.dumps(row, ensure_ascii=False) for row in rows],
        }
    )
    with plain_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        pq.write_table(table, temporary)
        os.replace(temporary, path)


def read_piece(path: Path) -> list[Row]:
    """The rows of one piece."""
    return [json.loads(text) for text in pq.read_table(path, columns=["row"])["row"].to_pylist()]


def _piece(about: Any, rows: list[Row]) -> Piece:
    return Piece(f"{canonical_hash([about, rows])[:24]}.parquet", rows)


def _missing(pieces: Sequence[Piece], folder: Path) -> list[Piece]:
    return [piece for piece in pieces if not (folder / piece.name).exists()]


def _transformers_engine(job: GenerationJob, tokenizer: Any) -> Callable[[list[Any]], list[Any]]:
    """A loaded model that samples one batch of requests, as in the single-process path."""
    model = load_policy(job.model, job.dtype, job.adapter)
    stops = sorted({*stop_token_ids(tokenizer, model), tokenizer.pad_token_id})
    model.generation_config = generation.GenerationConfig()

    def sample(requests: list[Any]) -> list[Any]:
        limit = job.settings.max_new_tokens
        generation.check_lengths(model, requests, limit)
        flat = generation.sample_batch(
            model, requests, stops, tokenizer.pad_token_id, limit, job.settings.top_p
        )
        count = len(job.temperatures)
        return [flat[start : start + count] for start in range(0, len(flat), count)]

    return sample


def _vllm_engine(job: GenerationJob, tokenizer: Any) -> Callable[[list[Any]], list[Any]]:
    """A vLLM engine in this process; an adapter is merged into a temporary model first."""
    if importlib.util.find_spec("vllm") is None:
        raise GuideError(vllm_backend.INSTALL)
    from vllm import LLM

    stops = sorted({*stop_token_ids(tokenizer), tokenizer.pad_token_id})
    with tempfile.TemporaryDirectory() as scratch:
        folder = job.model
        if job.adapter:
            merged = load_policy(job.model, job.dtype, job.adapter)
            folder = str(save_model(merged, tokenizer, scratch))
            del merged
            torch.cuda.empty_cache()
        device, dtype, _ = choose_device(job.dtype)
        longest = AutoConfig.from_pretrained(folder).max_position_embeddings
        engine = LLM(
            model=folder,
            dtype=str(dtype).removeprefix("torch."),
            enable_prefix_caching=True,
            **vllm_backend.engine_options(device.type, longest),
        )

    def sample(requests: list[Any]) -> list[Any]:
        asked, settings = [asdict(request) for request in requests], job.settings
        return vllm_backend.draw_answers(
            engine, asked, settings.max_new_tokens, settings.top_p, stops
        )

    return sample


class _Actor:
    """One process of the Ray job, with its engine or scorer; its calls do one piece each."""

    def __init__(self, job: Job, folder: str) -> None:
        self.work, self.folder = job.open(), Path(folder)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        name = str(batch["name"][0])
        if not (self.folder / name).exists():  # a retried block holds pieces that were done
            write_piece(self.folder / name, self.work(json.loads(str(batch["rows"][0]))))
        return {"name": [name]}


def _run_actors(job: Job, pieces: Sequence[Piece], folder: Path, actors: int | None) -> None:
    """Stream the pieces through a pool of actors; each is on the disk as soon as it is done."""
    if importlib.util.find_spec("ray") is None:
        raise GuideError(INSTALL)
    ray, started_here = _join_cluster(actors)
    from ray.data.exceptions import RayDataUserCodeException

    try:
        device, actors = _placement(ray.cluster_resources(), actors)
        items = [{"name": piece.name, "rows": json.dumps(piece.rows)} for piece in pieces]
        done = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            _Actor,
            fn_constructor_args=(job, str(folder.absolute())),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(actors, len(items))),
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
            **device,
        )
        bar = tqdm(total=len(items), desc="pieces", file=sys.stdout)
        for batch in done.iter_batches(batch_size=1):
            bar.update(len(batch["name"]))
        bar.close()
    except (ray.exceptions.RayError, RayDataUserCodeException) as error:
        lines = str(error).strip().splitlines()
        ours = [line for line in lines if line.startswith("rlhf_guide.errors.")]
        said = ours[-1].partition(": ")[2] if ours else lines[-1]  # Ray's last line is advice
        left = len(_missing(pieces, folder))
        raise GuideError(
            f"the Ray job stopped with {left} of {len(pieces)} pieces left: {said}\nFinished "
            "pieces are kept: mend the cause and give the same command again."
        ) from error
    finally:
        if started_here:
            ray.shutdown()


def _join_cluster(actors: int | None) -> tuple[Any, bool]:
    """Ray, connected to the cluster that RAY_ADDRESS names or to one that is started here.

    The second value is True in the latter case. That cluster stays on the loopback address, without
    dashboard and usage reports.
    """
    cluster = os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not cluster:  # what Ray does on macOS; it reads the variable when it is imported
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    if ray.is_initialized():
        return ray, False
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if cluster:
        ray.init(address="auto", **quiet)
    else:
        _start(
            ray,
            num_cpus=max(usable_cores(), actors or 1),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE,
            **quiet,
        )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return ray, True


def _start(ray: Any, **options: Any) -> None:
    """Start a cluster here; again where Ray's own 30 s were too short for it.

    The first start on a machine also compiles Ray's modules, the next ones do not. Raises
    GuideError when none succeeds.
    """
    for _ in range(STARTS):
        try:
            ray.init(**options)
            return
        except Exception as error:  # Ray raises no class of its own here
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
    raise GuideError(
        f"Ray did not start within its own 30 s, {STARTS} times over: this machine is too busy. "
        "Give the same command again later, or let tasks of a job array do the pieces "
        "(--shard 0/8), which need no Ray."
    )


def _placement(resources: dict[str, float], actors: int | None) -> tuple[dict[str, float], int]:
    """What an actor asks Ray for, and how many there are: one a GPU, else one a CPU core."""
    kind = "GPU" if resources.get("GPU") else "CPU"
    room = int(resources[kind])
    if actors is not None and not 1 <= actors <= room:
        raise ParameterError(
            f"{actors} actors were asked for; the cluster has {room} {kind}(s), one for each: "
            f"choose 1 to {room}, or add nodes to the cluster."
        )
    return {f"num_{kind.lower()}s": 1}, actors or room


def open_generation(ws: Any, t: int) -> tuple[Any, GenerationJob, list[Row], Path]:
    """Stage, job, prompts and result file of iteration t's answers (see `online_stages`)."""
    from rlhf_guide.online_stages import ANSWERS, iteration_prompts, open_answers
    from rlhf_guide.policies import iteration_policy

    profile = ws.profile
    stage = open_answers(ws, t, profile)
    model, adapter = iteration_policy(ws, t - 1)
    job = GenerationJob(
        str(model),
        profile.generation,
        tuple(stage.config["temperatures"]),
        stage.config["seed"],
        profile.dtype,
        str(adapter) if adapter else None,
    )
    return stage, job, iteration_prompts(ws, t, profile), stage.dir / ANSWERS


def open_annotation(ws: Any, t: int) -> tuple[Any, AnnotationJob, list[Row], Path]:
    """Stage, job, generations and result file of iteration t's rewards (see `online_stages`)."""
    from rlhf_guide.online_stages import REWARDS, load_answers, open_rewards
    from rlhf_guide.policies import model_folder

    profile = ws.profile
    stage = open_rewards(ws, t, profile)
    job = AnnotationJob(
        str(model_folder(ws.load("reward_model"))), profile.dtype, stage.config["max_length"]
    )
    return stage, job, load_answers(ws, t), stage.dir / REWARDS


def main(arguments: Sequence[str] | None = None) -> int:
    """The answers or rewards of one iteration of a run: a share of them, or the whole stage."""
    options = _parser().parse_args(arguments)
    try:
        print(_command(options))
        return 0
    except GuideError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rlhf_guide.distributed")
    parser.add_argument("stage", choices=("generation", "annotation"))
    parser.add_argument("--profile", help="smoke, cpu (default), gpu or paper")
    parser.add_argument("--run-dir", help="the run folder; by default runs/<profile>")
    parser.add_argument("--iteration", type=int, default=1, help="1, 2 or 3")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="replace one number"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--actors", type=int, help="Ray actors; by default one for each GPU")
    how.add_argument("--shard", metavar="I/N", help="without Ray: every N-th piece from I on")
    how.add_argument(
        "--collect", action="store_true", help="join the shards' pieces and finish the stage"
    )
    return parser


def _command(options: argparse.Namespace) -> str:
    from rlhf_guide.course import parse_settings
    from rlhf_guide.notebook import quieten, stay_offline
    from rlhf_guide.profiles import load_profile
    from rlhf_guide.workspace import open_run, shown

    profile = load_profile(options.profile, **parse_settings(options.set))
    stay_offline(profile.allow_download)
    quieten()
    ws = open_run(profile, options.run_dir)
    open_stage = open_generation if options.stage == "generation" else open_annotation
    stage, job, rows, path = open_stage(ws, options.iteration)
    if stage.done:
        return f"stage {stage.name} has finished; nothing to do."
    if options.shard:
        shard, of = _shard(options.shard)
        return f"{run_shard(job, rows, path, shard, of)} pieces done in {shown(path.parent)}"
    if options.collect:
        done = collect(job.pieces(rows), rows, path)
    else:
        done = run(job, rows, path, options.actors)
    _finish(ws, options.stage, options.iteration, done)
    return f"stage {stage.name} has finished: {len(done)} prompts in {shown(path)}"


def _finish(ws: Any, stage: str, t: int, rows: list[Row]) -> None:
    """Finish the stage as notebook 07 does; as every row is there, no model is loaded."""
    from rlhf_guide.online_stages import sample_answers, score_answers

    if stage == "generation":
        sample_answers(ws, t, ws.profile)
    else:
        scorer = SimpleNamespace(name=rows[0]["reward_model"])
        score_answers(ws, t, ws.profile, lambda: scorer)


def _shard(text: str) -> tuple[int, int]:
    try:
        shard, of = map(int, text.split("/"))
    except ValueError:
        raise ParameterError(f"--shard {text!r}: give it as I/N, such as 0/8.") from None
    return shard, of


if __name__ == "__main__":
    sys.exit(main())
