"""How far a policy has moved from its reference, on answers that it wrote itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from rlhf_guide.chat import encode_completion
from rlhf_guide.models import load_policy, load_tokenizer
from rlhf_guide.policies import Policy


@torch.inference_mode()
def answer_divergence(
    policy: Policy, reference: Policy, rows: Sequence[Mapping], dtype: str | torch.dtype = "auto"
) -> list[float]:
    """Estimate KL(π ‖ π0) for each row's prompt, in nats, from its first answer.

    The sum over the answer's tokens of KL(π(·|x, a_<t) ‖ π0(·|x, a_<t)), each computed over the
    whole vocabulary. For answers that π drew at temperature 1 its mean is the KL of whole answers,
    as is that of log π(a|x)/π0(a|x), which scatters more and can be negative. Of answers drawn at
    another temperature it is the divergence along *their* paths.
    """
    tokenizer = load_tokenizer(reference[0])
    models = [load_policy(model, dtype, adapter) for model, adapter in (policy, reference)]
    found = []
    for row in rows:
        answer = row["responses"][0]
        finished = answer["finish_reason"] == "stop"
        prompt, ids = encode_completion(
            tokenizer, row["messages"], answer["text"], finished=finished
        )
        log_p, log_q = (_next_token_logs(model, prompt, ids) for model in models)
        found.append(float((log_p.exp() * (log_p - log_q)).sum()))
    return found


def _next_token_logs(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Log-probabilities over the vocabulary before each token of the answer, (tokens, n)."""
    ids = torch.tensor([prompt + answer], device=model.device)
    logits = model(input_ids=ids, logits_to_keep=len(answer) + 1).logits[0, :-1]
    return logits.float().log_softmax(-1)
