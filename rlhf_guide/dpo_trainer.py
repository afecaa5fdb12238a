"""TRL's DPO trainer, changed in four places.

It takes token ids, reads prompts once, has cheaper logits and knows the optimistic term.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from trl import DPOTrainer
from trl.trainer import utils as trl_utils

from rlhf_guide.shared_prompts import shared_prompts


class PairTrainer(DPOTrainer):
    """DPOTrainer that takes token ids as they are: TRL 1.16 would template the text again.

    With ``optimism_weight`` the loss has the optimistic term (see `dpo_losses`), for which TRL's
    DPO has no option: every row then has ``reference_ids``, an answer of π0.
    """

    def __init__(self, *args: Any, optimism_weight: float = 0.0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.optimism_weight = optimism_weight
        if optimism_weight:  # only now: TRL's own pass over the pairs is done
            self.data_collator = _WithReferenceAnswers(self.data_collator)

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def compute_ref_log_probs(self, *args: Any, **kwargs: Any) -> Any:
        with _answer_tokens_only(), self._prompts_once():
            return super().compute_ref_log_probs(*args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        answers = inputs.pop("reference", None)
        with _answer_tokens_only():
            with self._prompts_once():
                loss = super()._compute_loss(model, inputs, return_outputs)
            if answers is None:
                return loss
            return loss + self.optimism_weight * self._reference_answers_logp(model, answers)

    def _prompts_once(self) -> AbstractContextManager:
        models = [self.model] if self.ref_model is None else [self.model, self.ref_model]
        contexts = ExitStack()
        for model in models:
            contexts.enter_context(shared_prompts(self.accelerator.unwrap_model(model)))
        return contexts

    def _reference_answers_logp(self, model: Any, answers: dict[str, Any]) -> torch.Tensor:
        """Mean over the batch of log π(y|x), summed over the tokens of π0's answers y; in nats."""
        mask = answers.pop("completion_mask")
        labels = answers["input_ids"].masked_fill(mask == 0, -100)
        outputs = model(**answers, labels=labels, use_cache=False, fused_lm_head=True)
        logps = outputs.log_probs.sum(dim=1)
        gathered = self.accelerator.gather(logps.detach())
        self._metrics["train"]["logps/reference"].append(gathered.mean().item())
        return logps.mean()


class _WithReferenceAnswers:
    """TRL's collator, whose batch of pairs gets π0's answers to the same prompts beside it."""

    def __init__(self, collate: Callable[[list[dict]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        as_pairs = [
            {
                "prompt_ids": row["prompt_ids"],
                "chosen_ids": row["reference_ids"],
                "rejected_ids": [],
            }
            for row in rows
        ]
        # The collator stacks all chosen sequences, then all rejected ones: here bare prompts.
        answers = {name: values[: len(rows)] for name, values in self.collate(as_pairs).items()}
        return {**self.collate(rows), "reference": answers}


def _answer_tokens_only() -> AbstractContextManager:
    """Let TRL project only answer tokens onto the vocabulary on a CPU too, as it does on CUDA.

    Prompts and padding are more than half of a batch, and with a small model the vocabulary is a
    large part of a step. The result is the same (tests/test_dpo.py compares it with plain logits).
    """
    return mock.patch.object(trl_utils, "_use_triton", return_value=True)
