"""What all trainers share: TRL's arguments from a profile's numbers, resuming, the history.

Every stage's global batch is fixed by the recipe; the gradient accumulation follows from it and
from how many examples fit on how many devices, so the same profile trains alike on one device and
on eight. Optimiser step k reads the same examples on any number of processes. One exception: where
an epoch's last batch is incomplete, accelerate fills the other processes' share of it with the
epoch's first examples.
"""

import copy
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback

from rlhf_guide import tracking
from rlhf_guide.errors import DataError, ParameterError
from rlhf_guide.workspace import Stage, read_json, read_jsonl, write_json, write_jsonl


def world_size() -> int:
    """Number of training processes; launchers such as accelerate and torchrun set it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process writes the files; without a launcher there is no other."""
    return os.environ.get("RANK", "0") == "0"


def accumulation_steps(batch_size: int, per_device: int, devices: int | None = None) -> int:
    """Micro-batches per optimiser step: batch = per device × devices × accumulation.

    Raises ParameterError when the global batch is not such a product.
    """
    devices = devices or world_size()
    steps, rest = divmod(batch_size, per_device * devices)
    if rest or not steps:
        raise ParameterError(
            f"a global batch of {batch_size} cannot be made of {per_device} per device on "
            f"{devices} device(s): make batch_size a multiple of {per_device * devices}, or start "
            f"a number of processes that divides {batch_size // per_device or 1}."
        )
    return steps


def training_dtype(lora_rank: int, dtype: torch.dtype) -> torch.dtype:
    """Data type in which a trainer loads the weights.

    With adapters the frozen weights keep `dtype` and peft holds the small trainable ones in
    float32. Full fine-tuning needs float32 weights (autocast still multiplies in bfloat16): a
    bfloat16 weight swallows updates below 1/256 of its size, and 5e-7 learning rates make only
    such updates.
    """
    return dtype if lora_rank else torch.float32


def common_arguments(
    settings: Any, output_dir: str | Path, seed: int, dtype: torch.dtype, track: str = "none"
) -> dict[str, Any]:
    """Arguments for any TRL config, from a profile's section; `track` is the profile's `tracking`.

    On a CPU there is neither autocast (the model's own data type is used as it is) nor gradient
    checkpointing (memory is not what is short). On CUDA both are on, and long runs save
    checkpoints; see `checkpoint`. Every step is logged: the notebooks draw each one.
    """
    cuda = torch.cuda.is_available()
    return {
        "output_dir": str(output_dir),
        "learning_rate": settings.learning_rate,
        "per_device_train_batch_size": settings.per_device_batch_size,
        "gradient_accumulation_steps": accumulation_steps(
            settings.batch_size, settings.per_device_batch_size
        ),
        "num_train_epochs": settings.epochs,
        # A number below 1 is a share of all steps.
        "warmup_steps": settings.warmup_ratio,
        "lr_scheduler_type": settings.scheduler,
        "weight_decay": getattr(settings, "weight_decay", 0.0),
        "bf16": cuda and dtype == torch.bfloat16,
        "fp16": False,
        # Sharding on CPUs passes as a device of its own, see launch.shard_on_cpu.
        "use_cpu": not cuda and "ACCELERATE_TORCH_DEVICE" not in os.environ,
        "gradient_checkpointing": cuda,
        "dataloader_pin_memory": cuda,
        "ddp_find_unused_parameters": False,  # all are used; looking for others costs time
        "seed": seed,
        "logging_steps": 1,
        "report_to": tracking.report_to(track),
        "disable_tqdm": True,
        "save_strategy": "steps" if cuda else "no",
        "save_steps": 200,
        "save_total_limit": 1,
    }


def checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint that a killed run left in the folder, or None.

    The trainer writes its state last: a checkpoint without it was cut off while it was written.
    """
    complete = [file.parent for file in Path(output_dir).glob("checkpoint-*/trainer_state.json")]
    newest = max(complete, key=lambda folder: int(folder.name.rsplit("-", 1)[1]), default=None)
    return str(newest) if newest else None


def remove_checkpoints(output_dir: str | Path) -> None:
    """Delete a finished run's checkpoints: they hold the optimiser's state, several model sizes.

    With them goes the model card that TRL writes beside them, whose tags stand in an order that
    differs from process to process (`rlhf-guide card` writes the course's own).
    """
    if not is_main_process():
        return
    for folder in Path(output_dir).glob("checkpoint-*"):
        shutil.rmtree(folder)
    (Path(output_dir) / "README.md").unlink(missing_ok=True)


def fit(trainer: Any, output_dir: str | Path) -> torch.nn.Module | None:
    """Train, from a killed run's last checkpoint on if there is one; return the trained model.

    The main process gets the model with all its weights, even where training held only a shard of
    them on each device (FSDP, ZeRO-3), so that it is merged and saved as after training on one
    device. The other processes take part in the gathering and get None.
    """
    empty = _without_weights(trainer.model) if _sharded(trainer) else None
    trainer.train(resume_from_checkpoint=checkpoint(output_dir))
    accelerator = trainer.accelerator
    model = accelerator.unwrap_model(trainer.model)
    if empty is not None:
        weights = accelerator.get_state_dict(trainer.model_wrapped)
        model = _filled(empty, weights) if accelerator.is_main_process else None
    accelerator.wait_for_everyone()  # no process still writes its part of a checkpoint
    return model if accelerator.is_main_process else None


def _sharded(trainer: Any) -> bool:
    """Whether training will hold each weight in parts, on several devices."""
    if trainer.is_deepspeed_enabled:
        return trainer.accelerator.state.deepspeed_plugin.zero_stage == 3
    return trainer.is_fsdp_enabled


def _without_weights(model: torch.nn.Module) -> torch.nn.Module:
    """A copy whose parameters have shapes but no memory; tied ones stay tied."""
    shapes = {
        id(weight): torch.nn.Parameter(
            torch.empty_like(weight, device="meta"), requires_grad=weight.requires_grad
        )
        for weight in model.parameters()
    }
    return copy.deepcopy(model, shapes)


def _filled(empty: torch.nn.Module, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The copy with its weights; those of tied layers are one tensor again."""
    empty.load_state_dict(weights, assign=True)
    whole = empty.get_base_model() if hasattr(empty, "get_base_model") else empty
    whole.tie_weights()
    return empty


def train_once(stage: Stage, train: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A stage's `history` and `metrics`: from its folder, or by training and writing them there.

    Training may happen in a notebook or by `accelerate launch`; whoever comes second finds
    `history.jsonl`, which is written last. `history.csv` and `history.png` are for the eye.
    """
    rows, numbers = stage.dir / "history.jsonl", stage.dir / "training.json"
    if rows.exists():
        return {"history": read_jsonl(rows), "metrics": read_json(numbers)}
    result = train()
    if is_main_process():
        tracking.write_history(stage.dir, result["history"], stage.name)
        write_json(numbers, result["metrics"])
        write_jsonl(rows, result["history"])
    return result


def show_progress(trainer: Any, title: str) -> None:
    """One plain-text bar instead of a printed dictionary a step."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Bar(title))


class _Bar(TrainerCallback):
    """A bar over optimiser steps, with the last loss."""

    def __init__(self, title: str):
        self.title = title
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc=self.title, file=sys.stdout
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any
    ) -> None:
        if self.bar is not None and "loss" in (logs or {}):
            self.bar.set_postfix_str(f"loss {float(logs['loss']):.3f}", refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()


def history(trainer: Any) -> list[dict[str, float]]:
    """The trainer's log, one row a step: step, epoch, loss, learning_rate, grad_norm and so on.

    Raises DataError when the loss was not finite: nothing trained on it is worth keeping.
    """
    rows = [row for row in trainer.state.log_history if "loss" in row]
    rows = [{"step": row["step"], **_numbers(row)} for row in rows]
    broken = [row["step"] for row in rows if not math.isfinite(row["loss"])]
    if broken:
        raise DataError(
            f"the loss is not finite from step {broken[0]} on: lower the learning rate, or use "
            "dtype float32."
        )
    return rows


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in row.items() if key != "step"}


def run_metrics(trainer: Any) -> dict[str, float]:
    """Seconds, optimiser steps, and the mean loss over the first and last tenth of them."""
    rows = history(trainer)
    tenth = max(1, len(rows) // 10)
    seconds = [row["train_runtime"] for row in trainer.state.log_history if "train_runtime" in row]
    return {
        "train_seconds": float(seconds[-1]) if seconds else 0.0,
        "steps": trainer.state.global_step,
        "first_loss": sum(row["loss"] for row in rows[:tenth]) / tenth,
        "last_loss": sum(row["loss"] for row in rows[-tenth:]) / tenth,
    }
