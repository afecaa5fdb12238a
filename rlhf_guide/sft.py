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
from transformers import AutoModelForCausalLM

from rlhf_guide.chat import assistant_mask, encode_conversation
from rlhf_guide.errors import DataError
from rlhf_guide.models import choose_device, load_tokenizer, lora_config, save_model
from rlhf_guide.settings import SFT
from rlhf_guide.training import (
    checkpoint,
    common_arguments,
    history,
    run_metrics,
    show_progress,
    training_dtype,
)

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
    """Tokenised demonstrations and a count of those left out.

    A conversation longer than a block is dropped, not cut: its cut answer would teach to stop
    nowhere. Raises DataError when nothing is left.
    """
    rows = demonstrations[: settings.max_samples or None]
    tokenized = [tokenize(tokenizer, row["messages"], settings.completion_only) for row in rows]
    kept = [row for row in tokenized if len(row["input_ids"]) <= settings.max_length]
    if not kept:
        raise DataError(
            f"none of {len(rows)} demonstrations fits into sft_max_length = "
            f"{settings.max_length} tokens: raise it, or check the data stage."
        )
    counts = {"demonstrations": len(kept), "dropped_too_long": len(rows) - len(kept)}
    return Dataset.from_list(kept), counts


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
) -> Any:
    """TRL's SFTTrainer over tokenised rows, packed best-fit-decreasing when `packing`.

    With `lora_rank` 0 all weights train, else adapters on the attention and MLP projections.
    """
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        **common_arguments(settings, output_dir, seed, dtype),
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
) -> dict[str, Any]:
    """Fine-tune `base` on demonstrations and save the merged model, π0, in `output_dir`.

    Returns `history` (one row a step) and `metrics`: losses, steps, seconds, tokens per second,
    packed blocks and how full they are. Raises DataError when the loss stops being finite.
    """
    chosen = choose_device(dtype)[1]
    tokenizer = load_tokenizer(base)
    dataset, counts = build_dataset(tokenizer, demonstrations, settings)
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=training_dtype(settings.lora_rank, chosen), attn_implementation="sdpa"
    )
    trainer = build_trainer(model, tokenizer, dataset, settings, output_dir, seed, chosen)
    show_progress(trainer, "fine-tuning")
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint(output_dir))
    seconds = time.perf_counter() - started
    rows = history(trainer)
    merged = trainer.model.merge_and_unload() if settings.lora_rank else trainer.model
    save_model(merged.to(chosen), tokenizer, output_dir)
    metrics = {**counts, **run_metrics(trainer), **_packing_metrics(trainer, settings, seconds)}
    return {"history": rows, "metrics": metrics}


def _packing_metrics(trainer: Any, settings: SFT, seconds: float) -> dict[str, float]:
    """Blocks, fill, tokens a second (all tokens read) and tokens learnt from in one epoch."""
    packed = trainer.train_dataset
    tokens = sum(len(ids) for ids in packed["input_ids"])
    learnt = sum(label != IGNORED for labels in packed["labels"] for label in labels)
    return {
        "packed_blocks": len(packed),
        "fill": fill_rate(packed, settings.max_length),
        "tokens": tokens,
        "learnt_tokens": learnt,
        "tokens_per_second": tokens * settings.epochs / max(seconds, 1e-9),
    }
