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
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback
from trl import RewardConfig, RewardTrainer

from rlhf_guide.batching import bucketed_order, last_hidden_states, sample_rows
from rlhf_guide.chat import encode_conversation, truncate_left
from rlhf_guide.errors import DataError, WeightsError
from rlhf_guide.models import (
    load_reward_model,
    load_tokenizer,
    lora_config,
    save_model,
    weights_hash,
)
from rlhf_guide.settings import RewardModel
from rlhf_guide.training import (
    checkpoint,
    common_arguments,
    history,
    run_metrics,
    training_dtype,
)

Messages = list[dict[str, str]]

MAX_IDENTICAL_SHARE = 0.01  # more pairs than this equal after truncation: max_length is wrong


def bradley_terry_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Mean of −log σ(chosen − rejected), Eq. 4; both of shape (pairs,), returns a scalar.

    Only the difference counts: a constant added to all rewards changes nothing.
    """
    return -torch.nn.functional.logsigmoid(chosen - rejected).mean()


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[dict[str, Any]], max_length: int
) -> tuple[list[dict[str, list[int]]], dict[str, int]]:
    """Token ids of every pair, cut on the left to `max_length`, and counts of what happened.

    Returns rows `{"chosen_ids", "rejected_ids"}` and counts `pairs`, `truncated` and
    `identical_after_truncation` (left out of the rows). Raises DataError when there is no pair or
    when more than 1% of them became identical.
    """
    rows, counts = [], {"pairs": len(pairs), "truncated": 0, "identical_after_truncation": 0}
    for pair in pairs:
        whole = [encode_conversation(tokenizer, pair[side]) for side in ("chosen", "rejected")]
        chosen, rejected = (truncate_left(ids, max_length) for ids in whole)
        counts["truncated"] += any(len(ids) > max_length for ids in whole)
        if chosen == rejected:
            counts["identical_after_truncation"] += 1
        else:
            rows.append({"chosen_ids": chosen, "rejected_ids": rejected})
    _refuse_bad_encoding(counts, max_length)
    return rows, counts


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
) -> dict[str, Any]:
    """Train a reward model on preference pairs and save it as an ordinary model folder.

    `base` is a causal language model; `pairs` follow the standard format. With `lora_rank` > 0
    adapters and the scalar head are trained and merged before saving, with 0 all weights.
    Returns `history` (TRL's log, one row a step: loss, accuracy, margin, ...) and `metrics`.
    Raises DataError for pairs that carry no signal (see `encode_pairs`).
    """
    tokenizer = load_tokenizer(base)
    rows, counts = encode_pairs(
        tokenizer, sample_rows(pairs, settings.max_samples, seed), settings.max_length
    )
    order = bucketed_order(
        [max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows],
        settings.per_device_batch_size,
        seed,
    )
    trainer = RewardTrainer(
        model=new_reward_model(base, training_dtype(settings.lora_rank, dtype)),
        args=RewardConfig(
            **common_arguments(settings, output_dir, seed, dtype),
            max_length=None,  # TRL would drop long pairs; they are already cut on the left
            train_sampling_strategy="sequential",  # keep the bucketed order
        ),
        train_dataset=Dataset.from_list([rows[index] for index in order]),
        processing_class=tokenizer,
        peft_config=_adapter(settings.lora_rank),
    )
    trainer.remove_callback(PrinterCallback)  # it prints every logged step
    trainer.train(resume_from_checkpoint=checkpoint(output_dir))
    _save(trainer, tokenizer, settings, output_dir)
    metrics = {**counts, **run_metrics(trainer)}
    metrics["tokens"] = settings.epochs * sum(len(ids) for row in rows for ids in row.values())
    return {"history": history(trainer), "metrics": metrics}


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


def _adapter(rank: int) -> Any:
    return lora_config(rank, "SEQ_CLS", modules_to_save=["score"]) if rank else None


def _save(
    trainer: RewardTrainer,
    tokenizer: PreTrainedTokenizerBase,
    settings: RewardModel,
    output_dir: str | Path,
) -> None:
    """Merge the adapters and save; the tokenizer remembers on which side to cut."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if settings.lora_rank:
        model = model.merge_and_unload()
    tokenizer.truncation_side = "left"
    save_model(model, tokenizer, output_dir)


class RewardScorer:
    """A saved reward model that gives conversations their rewards.

    Rewards are float32 and do not depend on the batch, the order or the padding. They are only
    comparable with rewards of the same model: a Bradley–Terry model fixes differences, not levels.
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
        count, as in training.
        """
        sequences = [
            truncate_left(encode_conversation(self.tokenizer, messages), self.max_length)
            for messages in conversations
        ]
        hidden = last_hidden_states(self.model, sequences, self.tokenizer.pad_token_id, batch_size)
        return (hidden @ self.head.T)[:, 0].numpy()


def _require_reward_head(model: PreTrainedModel, path: Path) -> None:
    # A causal language model loads without complaint and gets a random head.
    if not any("SequenceClassification" in name for name in model.config.architectures or []):
        raise WeightsError(
            f"{path.name} holds a language model without a reward head, so its rewards would be "
            "random numbers: pass the folder that train_reward_model saved."
        )
