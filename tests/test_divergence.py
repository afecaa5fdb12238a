"""KL of a policy from its reference along its own answers."""

import pytest
import torch

from rlhf_guide.chat import encode_completion
from rlhf_guide.divergence import answer_divergence
from rlhf_guide.models import load_policy, load_tokenizer, resolve_model, save_model


def row(text, reason="stop"):
    prompt = [{"role": "user", "content": "Which colour?"}]
    return {"messages": prompt, "responses": [{"text": text, "finish_reason": reason}]}


@pytest.fixture(scope="module")
def base():
    return resolve_model("random-tiny-llama")


@pytest.fixture(scope="module")
def moved(base, tmp_path_factory):
    """The base with a last layer that prefers other tokens."""
    model = load_policy(base, torch.float32)
    with torch.no_grad():
        noise = torch.Generator().manual_seed(0)
        for weight in model.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=noise)
    return save_model(model, load_tokenizer(base), tmp_path_factory.mktemp("moved"))


def test_a_policy_has_not_moved_from_itself(base):
    assert answer_divergence((base, None), (base, None), [row("red")], torch.float32) == [0.0]


def test_the_sum_over_tokens_is_that_of_torch(base, moved):
    (found,) = answer_divergence((moved, None), (base, None), [row("red is nice")], torch.float32)
    tokenizer = load_tokenizer(base)
    prompt, ids = encode_completion(
        tokenizer, row("red is nice")["messages"], "red is nice", finished=True
    )
    logs = []
    for model in (moved, base):
        with torch.no_grad():
            logits = load_policy(model, torch.float32)(torch.tensor([prompt + ids])).logits[0]
        logs.append(logits[len(prompt) - 1 : -1].log_softmax(-1))
    expected = torch.nn.functional.kl_div(logs[1], logs[0], log_target=True, reduction="sum")
    assert found == pytest.approx(float(expected), rel=1e-4)
    assert found > 0.01


def test_an_answer_that_was_cut_has_no_end_of_turn_to_count(base, moved):
    rows = [row("red is nice"), row("red is nice", "length")]
    whole, cut = answer_divergence((moved, None), (base, None), rows, torch.float32)
    assert 0 < cut < whole
