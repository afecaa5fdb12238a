"""Supervised fine-tuning with packing and loss masking (paper §3.1), on TRL's SFTTrainer.

TRL gets token ids and labels that this course made itself, so what is learnt from is visible:
-100 marks a token that is read but not learnt. Packing puts several conversations in one block.
Two things keep them apart there: positions restart at 0 with every conversation, and transformers
derives from these restarts an attention mask that lets no token see another conversation. The mask
is derived only when the model gets neither an attention mask nor a cache; TRL 1.16 sees to both,
and tests/test_sft.py holds it to that, with losses and gradients.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, set_seed

from rlhf_guide.adapters import lora_config
from rlhf_guide.attention import attention_by_products
from rlhf_guide.chat import assistant_mask, check_template, encode_conversation
from rlhf_guide.errors import DataError, TemplateError
from rlhf_guide.generation import answer_config
from rlhf_guide.models import (
    LOADING,
    choose_device,
    load_tokenizer,
    merge_adapter,
    resolve_model,
    save_model,
)
from rlhf_guide.settings import SFT, section_dict
from rlhf_guide.training import (
    checkpoint,
    common_arguments,
    fit,
    history,
    remove_checkpoints,
    run_metrics,
    show_progress,
    train_once,
    training_dtype,
)
from rlhf_guide.workspace import Stage, Workspace, read_jsonl

IGNORED = -100  # the label that PyTorch's cross-entropy leaves out


def tokenize(
    tokenizer: Any, messages: Sequence[dict[str, str]], completion_only: bool = True
) -> dict[str, list[int]]:
    """`input_ids` and `labels` of one conversation.

    With `completion_only` the labels are the assistant's tokens, each turn's end included, and
    -100 elsewhere; without it every token is learnt.
    """
    if not completion_only:
        ids = encode_conversation(tokenizer, messages)
        return {"input_ids": ids, "labels": list(ids)}
    ids, mask = assistant_mask(tokenizer, messages)
    labels = [token if learnt else IGNORED for token, learnt in zip(ids, mask, strict=True)]
    return {"input_ids": ids, "labels": labels}


def build_dataset(
    tokenizer: Any, demonstrations: Sequence[dict[str, Any]], settings: SFT
) -> tuple[Dataset, dict[str, int]]:
    """Tokenised demonstrations, and how many were left out for which reason.

    Left out and counted: a conversation with an empty turn or none at all (`dropped_empty`), one
    that the assistant takes no part in (`dropped_no_answer`), and one longer than a block
    (`dropped_too_long`; it is not cut, as a cut answer would teach to stop nowhere). Raises
    TemplateError for a tokenizer that would corrupt the signal (see `chat.check_template`) or a
    conversation that its template cannot render, and DataError when nothing is left.
    """
    check_template(tokenizer)
    counts = dict.fromkeys(("dropped_empty", "dropped_no_answer", "dropped_too_long"), 0)
    rows = demonstrations[: settings.max_samples or None]
    kept = []
    for place, row in enumerate(rows):
        if fault := _fault(row["messages"]):
            counts[fault] += 1
            continue
        tokenized = _tokenize_row(tokenizer, row, place, settings.completion_only)
        if len(tokenized["input_ids"]) > settings.max_length:
            counts["dropped_too_long"] += 1
        else:
            kept.append(tokenized)
    if not kept:
        raise DataError(
            f"none of {len(rows)} demonstrations can be learnt from ({counts}): a block holds "
            f"sft_max_length = {settings.max_length} tokens; raise it, or check the data stage."
        )
    return Dataset.from_list(kept), {"demonstrations": len(kept), **counts}


def _fault(messages: Sequence[dict[str, str]]) -> str | None:
    """The count under which a conversation is left out before it is tokenised."""
    if not messages or any(not message["content"].strip() for message in messages):
        return "dropped_empty"
    if all(message["role"] != "assistant" for message in messages):
        return "dropped_no_answer"
    return None


def _tokenize_row(
    tokenizer: Any, row: dict[str, Any], place: int, completion_only: bool
) -> dict[str, list[int]]:
    """`tokenize`, with the row named where the template refuses it."""
    try:
        return tokenize(tokenizer, row["messages"], completion_only)
    except TemplateError as error:
        name = f"demonstration {place} (id {row.get('id', 'missing')})"
        raise TemplateError(f"{name}: {error}") from error


def fill_rate(packed: Dataset, block: int) -> float:
    """Share of the blocks' room that holds tokens, between 0 and 1."""
    return sum(len(ids) for ids in packed["input_ids"]) / (len(packed) * block)


def build_trainer(
    model: Any,
    tokenizer: Any,
    dataset: Dataset,
    settings: SFT,
    output_dir: str | Path,
    seed: int,
    dtype: torch.dtype,
    save_steps: int = 200,
    track: str = "none",
) -> Any:
    """TRL's SFTTrainer over tokenised rows, packed best-fit-decreasing when `packing`.

    With `lora_rank` 0 all weights train, else adapters on the attention and MLP projections.
    A checkpoint is written every `save_steps` optimiser steps, on every device.
    """
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        **{
            **common_arguments(settings, output_dir, seed, dtype, track),
            "save_strategy": "steps",
            "save_steps": save_steps,
        },
        max_length=settings.max_length,
        packing=settings.packing,
        packing_strategy="bfd",
        pad_to_multiple_of=None,
    )
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=lora_config(settings.lora_rank) if settings.lora_rank else None,
    )


def train_sft(
    base: str | Path,
    demonstrations: Sequence[dict[str, Any]],
    settings: SFT,
    output_dir: str | Path,
    seed: int,
    dtype: str | torch.dtype = "auto",
    save_steps: int = 200,
    track: str = "none",
) -> dict[str, Any]:
    """Fine-tune `base` on demonstrations and save the merged model, π0, in `output_dir`.

    A killed run goes on from its last complete checkpoint in `output_dir`, to the weights that it
    would have reached undisturbed; checkpoints are removed once π0 is saved. Returns `history`
    (one row a step) and `metrics`: losses, steps, seconds, tokens per second, packed blocks and
    how full they are. Raises DataError when the loss stops being finite.

    `track` is the profile's `tracking`. Under a launcher every process calls this, and the main
    one saves.
    """
    chosen = choose_device(dtype)[1]
    tokenizer = load_tokenizer(base)
    dataset, counts = build_dataset(tokenizer, demonstrations, settings)
    set_seed(seed)  # new adapters are drawn from the global state: equal on every process
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=training_dtype(settings.lora_rank, chosen), **LOADING
    )
    trainer = build_trainer(
        model, tokenizer, dataset, settings, output_dir, seed, chosen, save_steps, track
    )
    show_progress(trainer, "fine-tuning")
    started = time.perf_counter()
    resumed = checkpoint(output_dir)
    with attention_by_products():
        trained = fit(trainer, output_dir)
    seconds = time.perf_counter() - started
    rows = history(trainer)
    if trained is not None:
        whole = merge_adapter(trained) if settings.lora_rank else trained.to(chosen)
        save_model(whole, tokenizer, output_dir)
    remove_checkpoints(output_dir)
    metrics = {**counts, **run_metrics(trainer), **_packing_metrics(trainer, settings)}
    done_before = int(resumed.rsplit("-", 1)[1]) / trainer.state.max_steps if resumed else 0.0
    read = metrics["tokens"] * settings.epochs * (1 - done_before)
    return {"history": rows, "metrics": {**metrics, "tokens_per_second": read / max(seconds, 1e-9)}}


def _packing_metrics(trainer: Any, settings: SFT) -> dict[str, float]:
    """Blocks, fill, tokens read and tokens learnt from in one epoch."""
    packed = trainer.train_dataset
    return {
        "packed_blocks": len(packed),
        "fill": fill_rate(packed, settings.max_length),
        "tokens": sum(len(ids) for ids in packed["input_ids"]),
        "learnt_tokens": sum(label != IGNORED for row in packed["labels"] for label in row),
    }


def open_stage(ws: Workspace) -> Stage:
    """The stage `sft` of a run, with everything that its result depends on.

    Its result includes the answers that notebook 02 draws before and after training, so that
    notebook finishes it; `train_stage` alone does the training.
    """
    profile = ws.profile
    config = {
        "base_model": profile.base_model,
        "dtype": profile.dtype,
        "seed": profile.seed,
        "sft": section_dict(profile.sft),
        "generation": answer_config(profile.generation),
        "prompts": profile.evaluation.validation_prompts,
        "samples": profile.evaluation.validation_samples,
        "temperature": profile.evaluation.temperature,
    }
    return ws.stage("sft", config, ["data"])


def train_stage(stage: Stage) -> dict[str, Any]:
    """Train π0 on the run's demonstrations, unless that was done (see `training.train_once`)."""
    profile = stage.workspace.profile

    def train() -> dict[str, Any]:
        return train_sft(
            resolve_model(profile.base_model, profile.allow_download),
            read_jsonl(stage.workspace.load("data").dir / "sft.jsonl"),
            profile.sft,
            stage.dir / "model",
            profile.seed,
            profile.dtype,
            track=profile.tracking,
        )

    return train_once(stage, train)


if __name__ == "__main__":
    from rlhf_guide.launch import main

    main("sft", open_stage, train_stage)
