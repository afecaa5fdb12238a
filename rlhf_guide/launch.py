"""One training stage of a run from the command line, on one device or on many.

    python -m rlhf_guide.sft --profile cpu
    accelerate launch --config_file $(rlhf-guide config fsdp2) -m rlhf_guide.sft \\
        --profile paper --run-dir runs/paper

The stages are the modules `sft`, `reward_model`, `preference_model` and `dpo` (the offline
baseline). Each reads the run folder and writes into it exactly as its notebook does; the notebook
run afterwards with the same profile finds the training done and goes on with what follows it.
"""

import argparse
import atexit
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import GuideError, ParameterError
from .profiles import Profile, load_profile
from .workspace import Stage, Workspace, open_run, shown

CONFIGS = Path(__file__).with_name("configs")


def config_path(name: str) -> Path:
    """The file of an accelerate configuration: `ddp`, `fsdp2`, `zero2` or `zero3`.

    Raises ParameterError for another name, and for ZeRO where DeepSpeed is not installed.
    """
    known = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    if name not in known:
        raise ParameterError(f"unknown configuration {name!r}; there are {', '.join(known)}.")
    if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise ParameterError(
            f"{name} needs DeepSpeed, which is not installed: `pip install 'rlhf-guide[scale]'`, "
            "or use fsdp2, which shards as zero3 does and needs nothing more."
        )
    return CONFIGS / f"{name}.yaml"


def main(
    section: str,
    open_stage: Callable[[Workspace], Stage],
    train_stage: Callable[[Stage], dict[str, Any]],
    arguments: Sequence[str] | None = None,
) -> None:
    """Train one stage in this process, one of the launcher's or the only one; exits with 0 or 1.

    `section` names the profile's section and the module.
    """
    options = _parser(section).parse_args(arguments)
    try:
        _train(section, open_stage, train_stage, options)
    except GuideError as error:
        where = f" (process {os.environ['RANK']})" if "RANK" in os.environ else ""
        print(f"error{where}: {error}", file=sys.stderr)
        sys.exit(1)


def _parser(section: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m rlhf_guide.{section}")
    parser.add_argument("--profile", help="smoke, cpu (default), gpu or paper")
    parser.add_argument("--run-dir", help="the run folder; by default runs/<profile>")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="replace one number"
    )
    return parser


def _train(
    section: str,
    open_stage: Callable[[Workspace], Stage],
    train_stage: Callable[[Stage], dict[str, Any]],
    options: argparse.Namespace,
) -> None:
    from .course import parse_settings
    from .notebook import quieten, set_seeds, stay_offline
    from .training import accumulation_steps, is_main_process, world_size

    profile = load_profile(options.profile, **parse_settings(options.set))
    settings = getattr(profile, section)
    steps = accumulation_steps(settings.batch_size, settings.per_device_batch_size)
    if (warning := require_memory(profile, section, _gpu_memory())) and is_main_process():
        print(f"warning, estimated before loading: {warning}", file=sys.stderr)
    stay_offline(profile.allow_download)
    quieten()
    with process_group() as group:
        with group.main_process_first():  # one process clears a folder, the others find it ready
            stage = open_stage(open_run(profile, options.run_dir))
        set_seeds(profile.seed)
        metrics = train_stage(stage)["metrics"]
    if is_main_process():
        print(
            f"stage {stage.name} is trained in {shown(stage.dir)}: {settings.batch_size} a step = "
            f"{settings.per_device_batch_size} a device × {world_size()} process(es) × {steps} "
            f"accumulated; {_in_words(metrics)}"
        )


def require_memory(profile: Profile, section: str, room: float) -> str:
    """Refuse a stage whose model cannot lie in `room` bytes a device; else a warning, or nothing.

    Weights, gradients and optimizer state are counted: where they alone are too large, GuideError
    (see `plan.require_fit`). Activations are estimated, so with them it is a warning. Nothing is
    said where there is no GPU (`room` 0), where the launcher keeps state in main memory
    (offloading), or where the base model's sizes are not known.
    """
    from . import plan
    from .training import world_size

    if not room or _offloads():
        return ""
    settings = getattr(profile, section)
    judge = section in ("reward_model", "preference_model")
    try:
        model = plan.architecture(profile.reward_base_model if judge else profile.base_model)
    except ParameterError:
        return ""
    sides = 1 if section in ("sft", "preference_model") else 2  # chosen and rejected
    memory = plan.training_memory(
        model,
        settings.per_device_batch_size * settings.max_length * sides,
        lora_rank=settings.lora_rank,
        lora_layers=getattr(settings, "lora_layers", 0),
        devices=world_size(),
        strategy=_strategy(),
        head=section != "reward_model",
    )
    cost = dict.fromkeys(("steps", "tokens", "hours", "dollars"), 0)
    counted = {name: memory[name] for name in ("weights", "gradients", "optimizer")}
    plan.require_fit([plan.StagePlan(name=section, memory=counted, room=room, **cost)])
    usable = plan.assumed("usable_memory") * room
    return plan.StagePlan(name=section, memory=memory, room=usable, **cost).warning


def _strategy() -> str:
    """How the launcher asked to divide the model, in the planner's words."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    return "fsdp2" if os.environ.get("ACCELERATE_USE_FSDP") == "true" else "ddp"


def _offloads() -> bool:
    """Whether the launcher was asked to keep weights or optimizer state off the devices."""
    names = ("OPTIMIZER", "PARAM")
    zero = [os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{name}_DEVICE", "none") for name in names]
    return os.environ.get("FSDP_OFFLOAD_PARAMS") == "true" or zero != ["none", "none"]


def _gpu_memory() -> float:
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0


def _in_words(metrics: dict[str, Any]) -> str:
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    return ", ".join(f"{name} {value:.5g}" for name, value in numbers.items())


@contextmanager
def process_group() -> Iterator[Any]:
    """Join the launcher's processes, each with its own device, and wait for all at the end.

    Gives accelerate's `PartialState`; without a launcher it is a group of one. Raises
    ParameterError when a machine has more processes than GPUs, GuideError when another process of
    the group is lost.
    """
    import torch
    from accelerate import PartialState

    _check_devices(torch.cuda.device_count())
    cpu = not torch.cuda.is_available()
    if cpu and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpu()
        cpu = False
    group = PartialState(cpu=cpu)
    atexit.register(group.destroy_process_group)
    try:
        yield group
        group.wait_for_everyone()
    except RuntimeError as error:
        if not _lost_a_process(error):
            raise
        raise GuideError(
            "the connection to another process of this job broke; the log of the process or node "
            "that ended first says why. Give the same command again: finished stages are kept, and "
            f"training goes on from its last checkpoint. ({str(error).splitlines()[0]})"
        ) from error


def _lost_a_process(error: RuntimeError) -> bool:
    """NCCL's errors have a class of their own; gloo's only have their words."""
    from torch.distributed import DistError

    said = str(error)
    return isinstance(error, DistError) or "closed by peer" in said or "reset by peer" in said


def _check_devices(gpus: int) -> None:
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if gpus and here > gpus:
        raise ParameterError(
            f"{here} processes were started on a machine with {gpus} GPU(s), and each needs one of "
            f"its own: start with --num_processes {gpus} (for each machine)."
        )


def shard_on_cpu() -> None:
    """Let accelerate shard a model over CPU processes, for tests and for a look at home.

    accelerate 1.15 ignores FSDP on a machine without GPUs, and would silently train with DDP.
    PyTorch's sharding itself runs there, so the processes are declared to be devices of their own
    that talk over gloo.
    """
    from accelerate import DistributedType, PartialState

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
