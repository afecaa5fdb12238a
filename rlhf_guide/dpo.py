"""Direct preference optimisation on TRL, with a reference that stays where it was put.

The loss is the paper's Eq. 5 (its η is TRL's β). `train_dpo` serves both offline DPO and each
iteration of Algorithm 2, where the policy is warm-started from the previous one while the
reference remains the SFT policy π0. With LoRA the reference costs no memory: it is the policy with
its adapter switched off.

Only this module and `dpo_trainer` touch TRL's `DPOTrainer`; checked against TRL 1.16.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from accelerate import PartialState
from datasets import Dataset, load_from_disk
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, set_seed
from trl import DPOConfig

from rlhf_guide.adapters import lora_config
from rlhf_guide.batching import bucketed_order, sample_rows
from rlhf_guide.chat import encode_completion, truncate_left
from rlhf_guide.dpo_losses import loss_arguments
from rlhf_guide.dpo_trainer import PairTrainer
from rlhf_guide.errors import DataError
from rlhf_guide.models import (
    choose_device,
    load_policy,
    load_tokenizer,
    merge_adapter,
    save_model,
    weights_hash,
)
from rlhf_guide.policies import POLICY, sft_policy
from rlhf_guide.settings import DPO, section_dict
from rlhf_guide.training import (
    common_arguments,
    fit,
    history,
    is_main_process,
    remove_checkpoints,
    train_once,
    training_dtype,
    world_size,
)
from rlhf_guide.workspace import Stage, Workspace, read_json, read_jsonl, write_json

MIN_ANSWER_TOKENS = 8
SHARED_ROWS = "pairs"  # folder of the encoded pairs while several processes train


def dpo_loss(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """Return the DPO loss of each pair (Eq. 5), from four vectors of summed log-probabilities.

    −log σ(β · [log π(y⁺|x)/π0(y⁺|x) − log π(y⁻|x)/π0(y⁻|x)]); all shapes (pairs,), in nats. Zero
    margin gives ln 2 ≈ 0.693, the loss before the first step.
    """
    chosen_ratio = policy_chosen - reference_chosen
    rejected_ratio = policy_rejected - reference_rejected
    return -F.logsigmoid(beta * (chosen_ratio - rejected_ratio))


def train_dpo(
    reference_path: str | Path,
    pairs: Sequence[Mapping],
    settings: DPO,
    output_dir: str | Path,
    seed: int,
    dtype: torch.dtype,
    initial_adapter: str | Path | None = None,
    merge: bool = False,
    track: str = "none",
) -> dict[str, Any]:
    """Train a policy on preference pairs against the fixed reference π0 and save it.

    The policy starts at the reference, or at ``initial_adapter``: the folder that an earlier call
    saved (an adapter, or a whole model when ``lora_rank`` is 0). Optimiser and schedule start
    afresh. ``output_dir`` receives the adapter alone; with ``merge``, or with ``lora_rank`` 0, an
    ordinary model folder. ``settings`` choose the loss and its two further terms; see
    `dpo_losses`. The optimistic one needs a ``reference`` conversation in every pair, which ends
    with an answer of π0, and is logged as ``logps/reference``.

    Returns ``history`` (one dictionary a step: loss, logps, implicit rewards, margins),
    ``reference_logps`` (pair → (chosen, rejected) under π0, in the order of the kept pairs) and
    ``metrics``. Raises DataError when no pair survives tokenisation or a reference's answer lacks.

    ``track`` is the profile's ``tracking``. Under a launcher every process calls this, and the
    main one saves.
    """
    started = time.monotonic()
    tokenizer = load_tokenizer(reference_path)
    rows, dropped = encode_pairs(
        tokenizer, pairs, settings.max_length, with_reference=settings.optimism_weight > 0
    )
    if not rows:
        raise DataError(
            f"None of the {len(pairs)} preference pairs can be trained on ({dropped}): raise "
            "dpo_max_length or online_samples_per_prompt, or look at the pairs; where none was "
            "made, the stage of the pairs counts why (`dropped_tie`: all rewards were equal)."
        )
    trainer = make_trainer(
        reference_path, tokenizer, rows, settings, output_dir, seed, dtype, initial_adapter, track
    )
    reference_logps = _reference_logps(trainer)
    trained = fit(trainer, output_dir)
    steps = history(trainer)
    if trained is not None:
        _save(trained, tokenizer, Path(output_dir), merge)
    remove_checkpoints(output_dir)
    _forget_shared_rows(Path(output_dir))
    metrics = {
        "pairs": len(rows),
        **dropped,
        **summarise(steps, settings.beta),
        "tokens": sum(_tokens(row) for row in rows),
        "reference_hash": weights_hash(reference_path),
        "seconds": time.monotonic() - started,
    }
    return {"history": steps, "metrics": metrics, "reference_logps": reference_logps}


def make_trainer(
    reference_path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping],
    settings: DPO,
    output_dir: str | Path,
    seed: int,
    dtype: torch.dtype,
    initial_adapter: str | Path | None = None,
    track: str = "none",
) -> PairTrainer:
    """Build TRL's trainer: reference log-probs are computed here, once, under π0.

    Order matters with LoRA. Given a `PeftModel`, TRL 1.16 freezes a copy of the loaded adapter as
    its reference, so a warm start would silently move the reference to the previous policy. We
    pass the plain base with a LoRA configuration, let TRL compute π0's log-probs with the fresh
    adapter off, and only then load the earlier adapter's weights.
    """
    full = settings.lora_rank == 0
    weights = training_dtype(settings.lora_rank, dtype)
    arguments = _arguments(settings, output_dir, seed, dtype, track)
    ordered = _bucketed(rows, settings.per_device_batch_size, seed)
    set_seed(seed)  # new adapters are drawn from the global state: equal on every process
    model, reference = _load_models(reference_path, initial_adapter, weights, full)
    with mock.patch.dict(os.environ, {"TQDM_DISABLE": "1"}):  # no bar for the reference pass
        trainer = PairTrainer(
            model=model,
            ref_model=reference,
            args=arguments,
            train_dataset=_shared(ordered, Path(output_dir)),
            processing_class=tokenizer,
            peft_config=None if full else lora_config(settings.lora_rank, "CAUSAL_LM"),
            optimism_weight=settings.optimism_weight,
        )
    trainer.remove_callback(PrinterCallback)  # it prints every logged step
    trainer.ref_model = None  # its log-probs are columns of the data set now; free the memory
    if initial_adapter is not None and not full:
        load_adapter_weights(trainer.model, initial_adapter)
    return trainer


def load_adapter_weights(model: PeftModel, folder: str | Path) -> None:
    """Copy a saved LoRA adapter's weights into the model's "default" adapter, in place.

    Raises DataError when the folder's adapter has another shape or other modules.
    """
    weights = load_peft_weights(str(folder), device="cpu")
    try:
        outcome = set_peft_model_state_dict(model, weights, adapter_name="default")
    except RuntimeError as error:
        raise DataError(
            f"The adapter in {folder} does not fit this model ({str(error).splitlines()[0]}): it "
            "was trained with another dpo_lora_rank or base model. Start a new run folder."
        ) from error
    missing = [name for name in outcome.missing_keys if "lora_" in name]
    if outcome.unexpected_keys or missing:
        raise DataError(
            f"The adapter in {folder} covers other modules than this model's "
            f"({len(outcome.unexpected_keys)} unknown, {len(missing)} missing). "
            "Start a new run folder."
        )


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Mapping],
    max_length: int,
    with_reference: bool = False,
) -> tuple[list[dict], dict[str, int]]:
    """Tokenise pairs to ``prompt_ids``, ``chosen_ids``, ``rejected_ids``; count what is dropped.

    A long prompt loses its beginning (``prompts_cut``), a long answer its end
    (``cut_to_max_length``). An answer that was cut, by the generation limit or here, carries no
    end-of-turn token: it must not be taught as a stop. Pairs whose answers become the same tokens
    are dropped (``dropped_same_tokens``). With ``with_reference`` a row has ``reference_ids`` too;
    DataError where a pair has no ``reference``.
    """
    sides = ("chosen", "rejected")
    if with_reference:
        _require_reference(pairs)
        sides = (*sides, "reference")
    rows, counts = [], {"dropped_same_tokens": 0, "prompts_cut": 0, "cut_to_max_length": 0}
    for index, pair in enumerate(pairs):
        prompt, answers = _encode_sides(tokenizer, pair, sides)
        longest = max(map(len, answers.values()))
        room = max(max_length - longest, max_length // 2, 1)
        kept = truncate_left(prompt, min(room, max_length - MIN_ANSWER_TOKENS))
        space = max_length - len(kept)
        counts["prompts_cut"] += len(kept) < len(prompt)
        counts["cut_to_max_length"] += longest > space
        answers = {name: ids[:space] for name, ids in answers.items()}
        if answers["chosen_ids"] == answers["rejected_ids"]:
            counts["dropped_same_tokens"] += 1
            continue
        rows.append({"row": index, "prompt_ids": kept, **answers})
    return rows, counts


def summarise(steps: Sequence[Mapping], beta: float) -> dict[str, float]:
    """Condense a training history: first and last loss, margins, log-ratios to the reference.

    ``start_*`` are the first step's numbers, ``end_*`` the mean over the last quarter of steps.
    ``*_log_ratio`` is log π(y|x) − log π0(y|x) in nats: the implicit reward divided by β.
    """
    logged = [step for step in steps if "rewards/margins" in step]
    tail = logged[-max(1, len(logged) // 4) :]
    result: dict[str, float] = {"steps": len(logged)}
    for label, part in (("start", logged[:1]), ("end", tail)):
        result[f"{label}_loss"] = _mean(part, "loss")
        result[f"{label}_margin"] = _mean(part, "rewards/margins")
        result[f"{label}_accuracy"] = _mean(part, "rewards/accuracies")
        for side in ("chosen", "rejected"):
            result[f"{label}_{side}_log_ratio"] = _mean(part, f"rewards/{side}") / beta
            result[f"{label}_{side}_logp"] = _mean(part, f"logps/{side}")
    return result


def _arguments(
    settings: DPO, output_dir: str | Path, seed: int, dtype: torch.dtype, track: str = "none"
) -> DPOConfig:
    return DPOConfig(
        **common_arguments(settings, output_dir, seed, dtype, track),
        **loss_arguments(settings),
        beta=settings.beta,
        remove_unused_columns=False,  # the collators take what they know
        max_length=None,  # encode_pairs has cut already, and counted
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=settings.per_device_batch_size,
        train_sampling_strategy="sequential",  # keep the bucketed order
    )


def _load_models(
    reference_path: str | Path, initial: str | Path | None, dtype: torch.dtype, full: bool
) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """Load the model to train and, for a warm start without LoRA, a separate reference."""
    if full and initial is not None:
        return load_policy(initial, dtype), load_policy(reference_path, dtype)
    return load_policy(reference_path, dtype), None


def _require_reference(pairs: Sequence[Mapping]) -> None:
    for pair in pairs:
        if "reference" not in pair:
            raise DataError(
                f"The pair of prompt {pair.get('prompt_id')!r} has no answer of the reference, "
                "which dpo_optimism_weight needs and only the online loop draws: set it to 0.0 to "
                "train on stored pairs."
            )


def _encode_sides(
    tokenizer: PreTrainedTokenizerBase, pair: Mapping, sides: Sequence[str]
) -> tuple[list[int], dict[str, list[int]]]:
    """The prompt's tokens, and the answers' as ``<side>_ids``."""
    answers = {}
    for side in sides:
        *messages, answer = pair[side]
        # Generated pairs say whether the answer ended by itself; stored ones keep the reason.
        by_reason = pair.get(f"{side}_finish_reason", "stop") != "length"
        finished = pair.get(f"{side}_finished", by_reason)
        prompt, ids = encode_completion(tokenizer, messages, answer["content"], finished=finished)
        answers[f"{side}_ids"] = ids
    return prompt, answers


def _bucketed(rows: Sequence[Mapping], batch_size: int, seed: int) -> list[dict]:
    # Batches of like length waste little padding, in the reference pass and in training.
    order = bucketed_order([_tokens(row) for row in rows], batch_size, seed)
    return [dict(rows[index]) for index in order]


def _shared(rows: list[dict], folder: Path) -> Dataset:
    """The rows as a data set that all processes read from one place.

    TRL 1.16 lets the main process write the reference's log-probabilities beside the data set's
    own file, and the others read them there; one in memory would have a folder for each process.
    """
    if world_size() == 1:
        return Dataset.from_list(rows)
    if is_main_process():
        _forget_shared_rows(folder)
        Dataset.from_list(rows).save_to_disk(folder / SHARED_ROWS)
    PartialState().wait_for_everyone()
    return load_from_disk(folder / SHARED_ROWS)


def _forget_shared_rows(folder: Path) -> None:
    if is_main_process():
        shutil.rmtree(folder / SHARED_ROWS, ignore_errors=True)


def _tokens(row: Mapping) -> int:
    return 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])


def _reference_logps(trainer: PairTrainer) -> list[tuple[float, float]]:
    data = trainer.train_dataset
    columns = (data[name] for name in ("row", "ref_chosen_logps", "ref_rejected_logps"))
    return [(chosen, rejected) for _, chosen, rejected in sorted(zip(*columns, strict=True))]


def _save(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, merge: bool) -> None:
    if isinstance(model, PeftModel) and not merge:
        _save_adapter(model, folder)
        return
    if isinstance(model, PeftModel):
        model = merge_adapter(model)
    save_model(model, tokenizer, folder)


def _save_adapter(model: PeftModel, folder: Path) -> None:
    """Save the adapter alone, so that equal runs leave equal files.

    peft writes this machine's path to the base into the configuration and into an empty card, and
    the names of the modules in an order that differs from process to process.
    """
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    file = folder / "adapter_config.json"
    config = read_json(file)
    config["base_model_name_or_path"] = "/".join(Path(config["base_model_name_or_path"]).parts[-2:])
    config["target_modules"] = sorted(config["target_modules"])
    write_json(file, config)


def _mean(steps: Sequence[Mapping], key: str) -> float:
    values = [float(step[key]) for step in steps if key in step]
    return sum(values) / len(values) if values else float("nan")


def open_stage(ws: Workspace) -> Stage:
    """The stage `offline_dpo` of a run; notebook 06 samples from its policy and finishes it."""
    config = {**section_dict(_offline_settings(ws)), "seed": ws.profile.seed}
    return ws.stage("offline_dpo", config, ["data", "sft"])


def train_stage(stage: Stage) -> dict[str, Any]:
    """Train on the run's stored pairs, unless that was done (see `training.train_once`)."""
    ws, profile = stage.workspace, stage.workspace.profile

    def train() -> dict[str, Any]:
        stored = read_jsonl(ws.load("data").dir / "preference_train.jsonl")
        result = train_dpo(
            sft_policy(ws)[0],
            sample_rows(stored, profile.dpo.max_samples, profile.seed),
            _offline_settings(ws),
            stage.dir / POLICY,
            profile.seed,
            choose_device(profile.dtype)[1],
            track=profile.tracking,
        )
        return {key: result[key] for key in ("history", "metrics")}

    return train_once(stage, train)


def _offline_settings(ws: Workspace) -> DPO:
    return replace(ws.profile.dpo, epochs=ws.profile.dpo.offline_epochs)


if __name__ == "__main__":
    from rlhf_guide.launch import main

    main("dpo", open_stage, train_stage)
