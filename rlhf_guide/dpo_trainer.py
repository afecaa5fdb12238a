"""TRL's DPO trainer, changed in four places.

It takes token ids, reads prompts once, has cheaper logits and knows the optimistic term. On a GPU
the logits are TRL's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch.utils.checkpoint import checkpoint
from trl import DPOTrainer
from trl.trainer import utils as trl_utils

from rlhf_guide.shared_prompts import shared_prompts

TILE = 2048  # answer tokens whose logits are in memory at once, on a CPU
# Logged by TRL, of no use to the loss, and not computed on a CPU.
NOT_COMPUTED = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")


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
            if not torch.cuda.is_available():
                for name in NOT_COMPUTED:
                    del self._metrics["train" if self.model.training else "eval"][name]
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


@contextmanager
def _answer_tokens_only() -> Iterator[None]:
    """On a CPU, project answer tokens alone onto the vocabulary, and compute what the loss needs.

    TRL 1.16 does the first on CUDA only. Its step also takes the entropy, the mean logit and the
    most likely token at every position, and rounds and copies its way through tiles of the
    vocabulary: with a small model all this costs more than the layers. The log-probabilities are
    the same (tests/test_dpo.py compares them with plain logits).
    """
    with ExitStack() as patches:
        if not torch.cuda.is_available():
            replaced = (
                mock.patch.object(trl_utils, "_use_triton", return_value=True),
                mock.patch.object(trl_utils, "_ChunkedLogProbFunction", _LogProbs),
            )
            for patch in replaced:
                patches.enter_context(patch)
        yield


class _LogProbs:
    """What TRL's function of the same arguments gives, and zeros for what was not computed."""

    @staticmethod
    def apply(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        _chunk_size: int,
        softcap: float | None,
        scale: float,
        _outputs: tuple[str, ...],
    ) -> tuple[torch.Tensor | None, ...]:
        def of_tile(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            logits = F.linear(hidden, weight, bias).float() * scale
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            return -F.cross_entropy(logits / temperature, targets, reduction="none")

        tiles = list(zip(hidden.split(TILE), targets.split(TILE), strict=True))
        if len(tiles) > 1:  # the backward pass computes a tile's logits again
            of_tile = partial(checkpoint, of_tile, use_reentrant=False)
        logps = torch.cat([of_tile(*tile) for tile in tiles])
        nothing = torch.zeros_like(logps)
        return logps, nothing, nothing, nothing, nothing.bool()
