"""Bradley–Terry reward model (paper, section 2.1): training and scoring.

A language model whose vocabulary head is replaced by one linear unit gives every conversation a
number r(x, a). It is trained so that the preferred answer gets the larger one:

    P(a₁ ≻ a₂ | x) = σ(r(x, a₁) − r(x, a₂))                                    (Eq. 1)
    loss = −E log σ(r(x, a_w) − r(x, a_l))                                      (Eq. 4)

    result = train_reward_model(base, pairs, profile.reward_model, folder, seed=42)
    rewards = RewardScorer(folder).score([conversation, ...])

Three traps are closed here. Conversations are cut on the *left*: a cut on the right removes the
answer and makes chosen and rejected equal. The reward is read at the last *real* token: with
pad = eos it would be read at the end of the question, and the loss would stay at ln 2. The head
starts at zero, so that the first loss is exactly ln 2 and anything else is a bug.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, set_seed
from trl import RewardConfig, RewardTrainer

from rlhf_guide.adapters import lora_config
from rlhf_guide.batching import (
    bucketed_order,
    last_hidden_states_read_once,
    sample_rows,
)
from rlhf_guide.chat import encode_conversation, truncate_left
from rlhf_guide.errors import DataError, WeightsError
from rlhf_guide.frozen_layers import frozen_layers_read_once
from rlhf_guide.models import (
    choose_device,
    last_layers,
    load_reward_model,
    load_tokenizer,
    merge_adapter,
    resolve_model,
    save_model,
    weights_hash,
)
from rlhf_guide.settings import RewardModel, section_dict
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

Messages = list[dict[str, str]]

MAX_IDENTICAL_SHARE = 0.01  # more pairs than this equal after truncation: max_length is wrong


def bradley_terry_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Mean of −log σ(chosen − rejected), Eq. 4; both of shape (pairs,), returns a scalar.

    Only the difference counts: a constant added to all rewards changes nothing.
    """
    return -torch.nn.functional.logsigmoid(chosen - rejected).mean()


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[dict[str, Any]],
    max_length: int,
    margin: bool = False,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Token ids of every pair, cut on the left to `max_length`, and counts of what happened.

    Returns rows `{"chosen_ids", "rejected_ids"}`, with `margin` also the pair's `margin` (see
    `score_margin`), and counts `pairs`, `truncated`, `empty_answer` (one of the two is; kept) and
    `identical_after_truncation` (left out of the rows). Raises DataError when there is no pair or
    when more than 1% of them became identical.
    """
    rows: list[dict[str, Any]] = []
    counts = {"pairs": len(pairs), "truncated": 0, "empty_answer": 0}
    counts["identical_after_truncation"] = 0
    for pair in pairs:
        whole = [encode_conversation(tokenizer, pair[side]) for side in ("chosen", "rejected")]
        chosen, rejected = (truncate_left(ids, max_length) for ids in whole)
        answers = [pair[side][-1]["content"] for side in ("chosen", "rejected")]
        counts["empty_answer"] += not all(answer.strip() for answer in answers)
        counts["truncated"] += any(len(ids) > max_length for ids in whole)
        if chosen == rejected:
            counts["identical_after_truncation"] += 1
        else:
            extra = {"margin": score_margin(pair)} if margin else {}
            rows.append({"chosen_ids": chosen, "rejected_ids": rejected, **extra})
    _refuse_bad_encoding(counts, max_length)
    return rows, counts


class PairTrainer(RewardTrainer):
    """RewardTrainer that reads what the two conversations of a pair have in common once."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's loss, metrics and logs (see `shared_prompts`)."""
        with shared_prompts(self.accelerator.unwrap_model(self.model), read_at=-1):
            return super().compute_loss(*args, **kwargs)


def score_margin(pair: dict[str, Any]) -> float:
    """By how much the annotators' scores differ; 0 where the vote went against them.

    Raises DataError for a pair without scores.
    """
    scores = pair.get("chosen_score"), pair.get("rejected_score")
    if None in scores:
        raise DataError(
            f"the pair of prompt {pair['prompt_id']!r} has no scores to take a margin from: set "
            "reward_model_margin=false, or train on sources that rate answers."
        )
    return max(0.0, scores[0] - scores[1])


def _refuse_bad_encoding(counts: dict[str, int], max_length: int) -> None:
    if counts["pairs"] == 0:
        raise DataError("there are no preference pairs to train on; run the data notebook (01).")
    identical = counts["identical_after_truncation"]
    if identical > MAX_IDENTICAL_SHARE * counts["pairs"]:
        raise DataError(
            f"{identical} of {counts['pairs']} preference pairs are identical in their last "
            f"{max_length} tokens, so nothing can be learnt from them: raise "
            "reward_model_max_length, or remove pairs whose two answers are equal."
        )


def train_reward_model(
    base: str | Path,
    pairs: Sequence[dict[str, Any]],
    settings: RewardModel,
    output_dir: str | Path,
    seed: int,
    dtype: torch.dtype = torch.float32,
    track: str = "none",
) -> dict[str, Any]:
    """Train a reward model on preference pairs and save it as an ordinary model folder.

    `base` is a causal language model; `pairs` follow the standard format. With `lora_rank` > 0
    adapters and the scalar head are trained and merged before saving, with 0 all weights.
    Returns `history` (TRL's log, one row a step: loss, accuracy, margin, ...) and `metrics`.
    Raises DataError for pairs that carry no signal (see `encode_pairs`).

    `track` is the profile's `tracking`. Under a launcher every process calls this, and the main
    one saves.
    """
    arguments = common_arguments(settings, output_dir, seed, dtype, track)
    tokenizer = load_tokenizer(base)
    rows, counts = encode_pairs(
        tokenizer,
        sample_rows(pairs, settings.max_samples, seed),
        settings.max_length,
        settings.margin,
    )
    order = bucketed_order(
        [max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows],
        settings.per_device_batch_size,
        seed,
    )
    set_seed(seed)  # new adapters are drawn from the global state: equal on every process
    model = new_reward_model(base, training_dtype(settings.lora_rank, dtype))
    adapted = settings.lora_layers if settings.lora_rank else 0
    ids = [row[side] for row in rows for side in ("chosen_ids", "rejected_ids")]
    with frozen_layers_read_once(model, adapted, ids, tokenizer.pad_token_id) as reading:
        sides = zip(reading.sequences[::2], reading.sequences[1::2], strict=True)
        read_rows = [
            {**row, "chosen_ids": chosen, "rejected_ids": rejected}
            for row, (chosen, rejected) in zip(rows, sides, strict=True)
        ]
        trainer = PairTrainer(
            model=model,
            args=RewardConfig(
                **arguments,
                max_length=None,  # TRL would drop long pairs; they are already cut on the left
                train_sampling_strategy="sequential",  # keep the bucketed order
                center_rewards_coefficient=settings.centring or None,
            ),
            train_dataset=Dataset.from_list([read_rows[index] for index in order]),
            processing_class=tokenizer,
            peft_config=_adapter(settings, model),
        )
        trainer.remove_callback(PrinterCallback)  # it prints every logged step
        trained = fit(trainer, output_dir)
    steps = history(trainer)
    if trained is not None:
        _save(trained, tokenizer, settings, output_dir)
    remove_checkpoints(output_dir)
    metrics = {**counts, **run_metrics(trainer)}
    metrics["train_seconds"] += reading.seconds
    metrics["tokens"] = settings.epochs * sum(
        len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows
    )
    return {"history": steps, "metrics": metrics}


def new_reward_model(base: str | Path, dtype: str | torch.dtype = torch.float32) -> PreTrainedModel:
    """The base model's backbone with a scalar head of zeros, so every reward is 0 at first.

    The head stays in float32 whatever `dtype` is: its updates would be lost in bfloat16.
    """
    model = load_reward_model(base, dtype)
    torch.nn.init.zeros_(model.score.weight)
    model.score.float()
    if model.dtype != torch.float32:
        model.score.register_forward_pre_hook(_to_float32)
    return model


def _to_float32(_module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (inputs[0].float(),)


def _adapter(settings: RewardModel, model: PreTrainedModel) -> Any:
    """Adapters on the last `lora_layers` of the model's layers, or none for full fine-tuning."""
    if not settings.lora_rank:
        return None
    layers = last_layers(model, settings.lora_layers)
    return lora_config(
        settings.lora_rank, "SEQ_CLS", modules_to_save=["score"], layers_to_transform=layers
    )


def _save(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    settings: RewardModel,
    output_dir: str | Path,
) -> None:
    """Merge the adapters and save; the tokenizer remembers on which side to cut."""
    if settings.lora_rank:
        model = merge_adapter(model)
    tokenizer.truncation_side = "left"
    save_model(model, tokenizer, output_dir)


def open_stage(ws: Workspace) -> Stage:
    """The stage `reward_model` of a run; notebook 03 scores the held-out pairs and finishes it."""
    profile = ws.profile
    config = {
        **section_dict(profile.reward_model),
        "base": profile.reward_base_model,
        "seed": profile.seed,
    }
    return ws.stage("reward_model", config, ["data"])


def train_stage(stage: Stage) -> dict[str, Any]:
    """Train on the run's preference pairs, unless that was done (see `training.train_once`)."""
    profile = stage.workspace.profile

    def train() -> dict[str, Any]:
        return train_reward_model(
            resolve_model(profile.reward_base_model, profile.allow_download),
            read_jsonl(stage.workspace.load("data").dir / "preference_train.jsonl"),
            profile.reward_model,
            stage.dir / "model",
            profile.seed,
            choose_device(profile.dtype)[1],
            profile.tracking,
        )

    return train_once(stage, train)


class RewardScorer:
    """A saved reward model that gives conversations their rewards.

    Rewards do not depend on the batch, the order or the padding, up to the rounding of `dtype`
    (the head is float32 in any case). They are only comparable with rewards of the same model: a
    Bradley–Terry model fixes differences, not levels.
    """

    def __init__(
        self, path: str | Path, dtype: str | torch.dtype = "auto", max_length: int = 4096
    ) -> None:
        """Load the folder. Raises WeightsError if it holds no trained reward head.

        `name` identifies the model in stored rewards: the first digits of its weights' hash.
        """
        self.path, self.max_length = Path(path), max_length
        self.tokenizer = load_tokenizer(path)
        self.model = load_reward_model(path, dtype).eval()
        _require_reward_head(self.model, self.path)
        self.name = f"reward-model-{weights_hash(path)[:12]}"
        self.head = self.model.score.weight.detach().float().cpu()  # (1, hidden)

    def score(self, conversations: Sequence[Messages], batch_size: int = 32) -> np.ndarray:
        """Rewards of whole conversations, shape (len(conversations),), in the given order.

        Each conversation ends with the answer to judge; of a long one the last `max_length` tokens
        count, as in training. `batch_size` conversations are read at a time where they are padded,
        that is, not on a CPU (see `batching.last_hidden_states_read_once`).
        """
        sequences = [
            truncate_left(encode_conversation(self.tokenizer, messages), self.max_length)
            for messages in conversations
        ]
        hidden = last_hidden_states_read_once(
            self.model,
            sequences,
            self.tokenizer.pad_token_id,
            batch_size,
        )
        return (hidden @ self.head.T)[:, 0].numpy()


def _require_reward_head(model: PreTrainedModel, path: Path) -> None:
    # A causal language model loads without complaint and gets a random head.
    if not any("SequenceClassification" in name for name in model.config.architectures or []):
        raise WeightsError(
            f"{path.name} holds a language model without a reward head, so its rewards would be "
            "random numbers: pass the folder that train_reward_model saved."
        )


if __name__ == "__main__":
    from rlhf_guide.launch import main

    main("reward_model", open_stage, train_stage)
