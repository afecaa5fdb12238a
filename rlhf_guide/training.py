"""What all trainers share: TRL's arguments from a profile's numbers, resuming, the history.

Every stage's global batch is fixed by the recipe; the gradient accumulation follows from it and
from how many examples fit on how many devices, so the same profile trains alike on one device and
on eight.
"""

import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback

from rlhf_guide.errors import DataError, ParameterError


def world_size() -> int:
    """Number of training processes; launchers such as accelerate and torchrun set it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def accumulation_steps(batch_size: int, per_device: int, devices: int | None = None) -> int:
    """Micro-batches per optimiser step: batch = per device × devices × accumulation.

    Raises ParameterError when the global batch is not such a product.
    """
    devices = devices or world_size()
    steps, rest = divmod(batch_size, per_device * devices)
    if rest or not steps:
        raise ParameterError(
            f"a global batch of {batch_size} cannot be made of {per_device} per device on "
            f"{devices} device(s): make batch_size a multiple of {per_device * devices}."
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
    settings: Any, output_dir: str | Path, seed: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Arguments for any TRL config, from a profile's section.

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
        "use_cpu": not cuda,
        "gradient_checkpointing": cuda,
        "dataloader_pin_memory": cuda,
        "seed": seed,
        "logging_steps": 1,
        "report_to": "none",
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
    """Delete a finished run's checkpoints: they hold the optimiser's state, several model sizes."""
    for folder in Path(output_dir).glob("checkpoint-*"):
        shutil.rmtree(folder)


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
