"""The counted work of a step, against the formula; rates and shares are plausible."""

from dataclasses import replace

import pytest
import torch

from rlhf_guide import sft, throughput
from rlhf_guide.models import load_policy, load_tokenizer, resolve_model
from rlhf_guide.profiles import load_profile

MESSAGES = [
    {"role": "user", "content": "Say rain."},
    {"role": "assistant", "content": "rain rain rain"},
]


@pytest.fixture
def step(tmp_path):
    """A trainer over all weights of the tiny model, and one packed batch."""
    base = resolve_model("random-tiny-llama")
    tokenizer = load_tokenizer(base)
    settings = replace(load_profile("smoke").sft, lora_rank=0)
    dataset, _ = sft.build_dataset(tokenizer, [{"messages": MESSAGES}] * 4, settings)
    model = load_policy(base, "float32").train()
    trainer = sft.build_trainer(model, tokenizer, dataset, settings, tmp_path, 0, torch.float32)
    return trainer, next(iter(trainer.get_train_dataloader()))


def test_flops_follow_the_formula(step):
    """Six a weight and token, forward and backward; the head forms its logits twice, so eight."""
    trainer, batch = step
    tokens = batch["input_ids"].numel()
    layers = trainer.model.model.layers
    weights = sum(m.weight.numel() for m in layers.modules() if isinstance(m, torch.nn.Linear))
    head = trainer.model.lm_head.weight.numel()
    expected = 6 * weights * tokens + 8 * head * (tokens - 1)  # the last token predicts nothing
    counted = throughput.step_flops(trainer, batch)
    assert expected <= counted <= 1.02 * expected  # attention's own products come on top
    assert all(p.grad is None for p in trainer.model.parameters())


def test_shares_are_shares(step):
    shares = throughput.step_shares(*step)
    assert set(shares) == {"matrix products", "attention", "everything else"}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["matrix products"] > 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_has_its_share_whichever_way_it_is_computed(step, dtype):
    """In bfloat16 on a CPU it is products and a softmax, which count as attention."""
    trainer, batch = step
    trainer.model.to(dtype)
    assert throughput.step_shares(trainer, batch)["attention"] > 0.0002


def test_a_matrix_product_takes_time():
    assert 1e7 < throughput.matmul_rate(torch.float32, size=64, seconds=0.01) < 1e16
