"""Generative pairwise preference model (paper, section 2.1): training and judging.

The model reads a question and two answers and says which is better in one token:

    user       [CONTEXT] {x} [RESPONSE A] {a₁} [RESPONSE B] {a₂}
    assistant  A

    P(a₁ ≻ a₂ | x) = p("A") / (p("A") + p("B"))

It is trained as plain fine-tuning with the loss on the label alone. Whether the better answer
stands in place A is drawn for every pair, or the model would learn the place. When judging, both
orders are asked and averaged, so that P(a, b) + P(b, a) = 1 whatever bias is left.

    result = train_preference_model(base, pairs, profile.preference_model, folder, seed=42)
    PreferenceScorer(folder).probability([(context_messages, answer_1, answer_2), ...])
"""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from rlhf_guide.adapters import lora_config
from rlhf_guide.batching import bucketed_order, last_hidden_states_read_once, sample_rows
from rlhf_guide.chat import encode_completion, encode_prompt
from rlhf_guide.comparisons import (
    Comparison,
    format_comparison,
    has_marker,
    knockout,
    labelled_comparisons,
    position_bias,
)
from rlhf_guide.errors import DataError, TemplateError
from rlhf_guide.frozen_layers import frozen_layers_read_once
from rlhf_guide.models import (
    LOADING,
    choose_device,
    last_layers,
    load_policy,
    load_tokenizer,
    merge_adapter,
    resolve_model,
    save_model,
)
from rlhf_guide.settings import PreferenceModel, section_dict
from rlhf_guide.shared_prompts import shared_prompts
from rlhf_guide.training import (
    common_arguments,
    fit,
    history,
    remove_checkpoints,
    run_metrics,
    train_once,
    training_dtype,
)
from rlhf_guide.workspace import Stage, Workspace, read_jsonl

LABELS = ("A", "B")
IGNORED = -100  # label of a token that does not enter the loss


def label_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Token ids of the labels A and B as they stand after the assistant's header.

    "A" and " A" are different tokens, so the ids are taken from a whole templated conversation.
    Raises TemplateError if a label is not exactly one token.
    """
    found = [
        encode_completion(tokenizer, [{"role": "user", "content": "?"}], label, finished=False)[1]
        for label in LABELS
    ]
    for label, ids in zip(LABELS, found, strict=True):
        if len(ids) != 1:
            raise TemplateError(
                f"the label {label!r} becomes {len(ids)} tokens after the assistant's header, so "
                "its probability is not one number: use a tokenizer or template that makes it one."
            )
    return found[0][0], found[1][0]


def encode_comparisons(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[dict[str, Any]],
    max_length: int,
    seed: int,
    both_orders: bool = False,
) -> tuple[list[dict[str, list[int]]], dict[str, int]]:
    """Training rows `{"input_ids", "labels"}` and counts of what happened.

    `labels` is −100 everywhere but on the last token, the label. A pair whose comparison is longer
    than `max_length` tokens is left out and counted: cutting it would remove the question or one of
    the answers. With `both_orders` every pair gives two rows, one after the other. Counts: `pairs`,
    `with_marker` (their texts contain a marker of the layout, defused), `too_long`, and `label_a`,
    the rows whose label is A. Raises DataError if nothing is left.
    """
    rows, counts = [], {"pairs": len(pairs), "too_long": 0, "label_a": 0}
    counts["with_marker"] = sum(map(has_marker, pairs))
    a_or_b = dict(zip(LABELS, label_token_ids(tokenizer), strict=True))
    comparisons, turns = list(labelled_comparisons(pairs, seed, both_orders)), 1 + both_orders
    for start in range(0, len(comparisons), turns):
        texts, labels = zip(*comparisons[start : start + turns], strict=True)
        prompts = [encode_prompt(tokenizer, [{"role": "user", "content": t}]) for t in texts]
        if max(map(len, prompts)) >= max_length:
            counts["too_long"] += 1
            continue
        counts["label_a"] += labels.count("A")
        for ids, label in zip(prompts, labels, strict=True):
            target = [IGNORED] * len(ids) + [a_or_b[label]]
            rows.append({"input_ids": [*ids, a_or_b[label]], "labels": target})
    if not rows:
        raise DataError(
            f"none of {len(pairs)} comparisons fits into {max_length} tokens: raise "
            "preference_model_max_length, or run the data notebook (01) if there are no pairs."
        )
    return rows, counts


class LabelTrainer(SFTTrainer):
    """TRL's SFTTrainer that builds logits at the labels only, one position in some hundred.

    The loss is unchanged; without a GPU, TRL would project every position to the vocabulary. With
    `side_by_side` the two orders of a pair are neighbours in the batch, and what they have in
    common, the context, is read once (see `shared_prompts`).
    """

    def __init__(self, *args: Any, side_by_side: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.side_by_side = side_by_side

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean cross-entropy of the labels over the whole (accumulated) batch; logs accuracy."""
        reading = nullcontext()
        if self.side_by_side:
            # The label is a sequence's last token, and said by the one before it.
            reading = shared_prompts(self.accelerator.unwrap_model(model), read_at=-2)
            inputs = {name: torch.cat([rows[::2], rows[1::2]]) for name, rows in inputs.items()}
        labels = inputs.pop("labels")[:, 1:]
        columns = (labels != IGNORED).any(dim=0).nonzero()[:, 0]
        with reading:
            outputs = model(**inputs, use_cache=False, logits_to_keep=columns)
        logits, targets = outputs.logits.float().flatten(0, 1), labels[:, columns].flatten()
        loss = torch.nn.functional.cross_entropy(
            logits, targets, ignore_index=IGNORED, reduction="sum"
        )
        real = targets != IGNORED
        correct = ((logits.argmax(dim=-1) == targets) & real).sum()
        counts = self.accelerator.gather(torch.stack([correct, real.sum()])).view(-1, 2).sum(dim=0)
        accuracy = (counts[0] / counts[1]).item()  # over all processes
        self._metrics["train" if model.training else "eval"]["accuracy"].append(accuracy)
        count = real.sum() if num_items_in_batch is None else num_items_in_batch
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        loss = loss / count
        return (loss, outputs) if return_outputs else loss


def train_preference_model(
    base: str | Path,
    pairs: Sequence[dict[str, Any]],
    settings: PreferenceModel,
    output_dir: str | Path,
    seed: int,
    dtype: torch.dtype = torch.float32,
    track: str = "none",
) -> dict[str, Any]:
    """Fine-tune a causal language model to name the better of two answers; save it to a folder.

    Comparisons are packed whole (never cut) into blocks of `max_length` when `settings.packing`.
    Returns `history` (one row a step: loss and accuracy of the label) and `metrics`.

    `track` is the profile's `tracking`. Under a launcher every process calls this, and the main
    one saves.
    """
    tokenizer = load_tokenizer(base)
    asked = sample_rows(pairs, settings.max_samples, seed)
    rows, counts = encode_comparisons(
        tokenizer, asked, settings.max_length, seed, settings.both_orders
    )
    set_seed(seed)  # new adapters are drawn from the global state: equal on every process
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=training_dtype(settings.lora_rank, dtype), **LOADING
    )
    adapted = settings.lora_layers if settings.lora_rank and not settings.packing else 0
    ids, pad = [row["input_ids"] for row in rows], tokenizer.pad_token_id
    with frozen_layers_read_once(model, adapted, ids, pad) as reading:
        read_rows = [
            {**row, "input_ids": states}
            for row, states in zip(rows, reading.sequences, strict=True)
        ]
        trainer = _build_trainer(
            model, tokenizer, read_rows, settings, output_dir, seed, dtype, track
        )
        trainer.remove_callback(PrinterCallback)  # it prints every logged step
        trained = fit(trainer, output_dir)
    steps = history(trainer)
    if trained is not None:
        whole = merge_adapter(trained) if settings.lora_rank else trained.to(dtype)
        save_model(whole, tokenizer, output_dir)
    remove_checkpoints(output_dir)
    metrics = {**counts, **run_metrics(trainer)}
    metrics["train_seconds"] += reading.seconds
    metrics["tokens"] = settings.epochs * sum(len(row["input_ids"]) for row in rows)
    return {"history": steps, "metrics": metrics}


def _build_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, list[int]]],
    settings: PreferenceModel,
    output_dir: str | Path,
    seed: int,
    dtype: torch.dtype,
    track: str = "none",
) -> LabelTrainer:
    together = 1 + settings.both_orders  # a pair's two orders go into one batch
    whole_pairs = settings.both_orders and settings.per_device_batch_size % 2 == 0
    lengths = [len(row["input_ids"]) for row in rows[::together]]
    pairs = bucketed_order(lengths, max(1, settings.per_device_batch_size // together), seed)
    order = [together * pair + turn for pair in pairs for turn in range(together)]
    arguments = SFTConfig(
        **common_arguments(settings, output_dir, seed, dtype, track),
        max_length=settings.max_length,
        packing=settings.packing,
        packing_strategy="bfd",
        pad_to_multiple_of=None,
        # Blocks are equally long; single comparisons keep the bucketed order, to pad little.
        train_sampling_strategy="random" if settings.packing else "sequential",
    )
    return LabelTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([rows[index] for index in order]),
        processing_class=tokenizer,
        peft_config=_adapter(settings, model),
        side_by_side=whole_pairs and not settings.packing,
    )


def _adapter(settings: PreferenceModel, model: PreTrainedModel) -> Any:
    if not settings.lora_rank:
        return None
    layers = last_layers(model, settings.lora_layers)
    return lora_config(settings.lora_rank, layers_to_transform=layers)


def open_stage(ws: Workspace) -> Stage:
    """The stage `preference_model` of a run; notebook 04 judges held-out pairs and finishes it."""
    profile = ws.profile
    config = {
        **section_dict(profile.preference_model),
        "base": profile.reward_base_model,
        "seed": profile.seed,
    }
    return ws.stage("preference_model", config, ["data", "reward_model"])


def train_stage(stage: Stage) -> dict[str, Any]:
    """Train on the run's preference pairs, unless that was done (see `training.train_once`)."""
    profile = stage.workspace.profile

    def train() -> dict[str, Any]:
        return train_preference_model(
            resolve_model(profile.reward_base_model, profile.allow_download),
            read_jsonl(stage.workspace.load("data").dir / "preference_train.jsonl"),
            profile.preference_model,
            stage.dir / "model",
            profile.seed,
            choose_device(profile.dtype)[1],
            profile.tracking,
        )

    return train_once(stage, train)


class PreferenceScorer:
    """A saved preference model that compares two answers to a context.

    A comparison is a tuple (context messages, answer a, answer b).
    """

    def __init__(
        self, path: str | Path, dtype: str | torch.dtype = "auto", batch_size: int = 16
    ) -> None:
        """Load the folder; raises TemplateError if A and B are not single tokens."""
        self.path, self.batch_size = Path(path), batch_size
        self.tokenizer = load_tokenizer(path)
        self.model = load_policy(path, dtype)
        rows = list(label_token_ids(self.tokenizer))
        weight = self.model.get_output_embeddings().weight
        self.head = weight.detach()[rows].float().cpu()  # (2, hidden): the rows of A and B

    def orders(self, comparisons: Sequence[Comparison]) -> np.ndarray:
        """P(a ≻ b) for both orders, shape (comparisons, 2).

        Column 0 is read with a in place A, column 1 with a in place B. A judge without position
        bias gives equal columns.
        """
        swapped = [(context, b, a) for context, a, b in comparisons]
        first = self._probability_of_a([*comparisons, *swapped])
        return np.stack([first[: len(comparisons)], 1 - first[len(comparisons) :]], axis=1)

    def probability(self, comparisons: Sequence[Comparison]) -> np.ndarray:
        """P(a ≻ b) averaged over both orders, shape (comparisons,); P(a, b) + P(b, a) = 1."""
        return self.orders(comparisons).mean(axis=1)

    def position_bias(self, comparisons: Sequence[Comparison]) -> float:
        """Share of the comparisons whose verdict changes with the order (see `comparisons`)."""
        return position_bias(self.orders(comparisons))

    def knockout(self, context: list[dict[str, str]], answers: Sequence[str]) -> dict[str, Any]:
        """Best of n answers in n − 1 matches (see `comparisons.knockout`)."""
        return knockout(self.probability, context, answers)

    def _probability_of_a(self, comparisons: Sequence[Comparison]) -> np.ndarray:
        sequences = [
            encode_prompt(
                self.tokenizer, [{"role": "user", "content": format_comparison(*comparison)}]
            )
            for comparison in comparisons
        ]
        hidden = last_hidden_states_read_once(
            self.model,
            sequences,
            self.tokenizer.pad_token_id,
            self.batch_size,
        )
        # Softmax over the two labels alone: the rest of the vocabulary cancels.
        logits = (hidden @ self.head.T).double()
        return torch.softmax(logits, dim=-1)[:, 0].numpy()


if __name__ == "__main__":
    from rlhf_guide.launch import main

    main("preference_model", open_stage, train_stage)
