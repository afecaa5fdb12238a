"""Replaced attention: the same numbers, as long as it is asked for, where it is faster."""

from types import SimpleNamespace

import pytest
import torch

from rlhf_guide import attention
from rlhf_guide.attention import ALL_ATTENTION_FUNCTIONS, attention_by_products
from rlhf_guide.models import load_policy, resolve_model

PLAIN = ALL_ATTENTION_FUNCTIONS["sdpa"]
MODULE = SimpleNamespace(num_key_value_groups=2, is_causal=True)  # 4 heads in 2 groups


def drawn(length, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, heads, length, 8) for heads in (4, 2, 2)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def mask_of(kind, length):
    """None: each token sees its past. Otherwise the first row is padded on the left."""
    if kind == "causal":
        return None
    seen = torch.ones(3, 1, length, length, dtype=torch.bool).tril()
    seen[0, :, :, :2] = False
    return seen if kind == "boolean" else torch.zeros(seen.shape).masked_fill(~seen, -1e30)


@pytest.fixture
def fused(monkeypatch):
    """Calls of PyTorch's own attention from now on, as a list of their shapes."""
    calls, plain = [], torch.nn.functional.scaled_dot_product_attention

    def watched(query, *rest, **options):
        calls.append(tuple(query.shape))
        return plain(query, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    return calls


@pytest.mark.parametrize("kind", ["causal", "boolean", "added"])
@pytest.mark.parametrize("scaling", [None, 0.2])
def test_products_and_kernel_agree(fused, kind, scaling):
    """Forward and backward pass; the same call twice, as by the next layer."""
    parts = [part.requires_grad_() for part in drawn(9)]
    mask = mask_of(kind, 9)
    mask = mask.to(torch.bfloat16) if kind == "added" else mask
    expected = ALL_ATTENTION_FUNCTIONS["sdpa"](MODULE, *parts, mask, scaling=scaling)[0]
    fused.clear()
    with attention_by_products():
        reading = ALL_ATTENTION_FUNCTIONS["sdpa"]
        found = [reading(MODULE, *parts, mask, scaling=scaling)[0] for _ in range(2)]
    assert fused == []
    assert torch.equal(*found)
    assert found[0].shape == expected.shape == (3, 9, 4, 8)
    # What a row of padding "sees" is never used: only that it is a number.
    assert bool(found[0].isfinite().all())
    used = slice(2, None)
    torch.testing.assert_close(found[0][:, used], expected[:, used], atol=0.03, rtol=0.03)
    slopes = [torch.autograd.grad(one[:, used].sum(), parts) for one in (found[0], expected)]
    for ours, theirs in zip(*slopes, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.1, rtol=0.05)


def test_every_length_and_mask_has_its_own_addition():
    """What is kept from the layer before belongs to its mask."""
    with attention_by_products():
        reading = ALL_ATTENTION_FUNCTIONS["sdpa"]
        for length in (9, 5):
            parts = drawn(length)
            for kind in ("causal", "boolean", "causal"):
                mask = mask_of(kind, length)
                found = reading(MODULE, *parts, mask)[0][:, 2:]
                plain = PLAIN(MODULE, *parts, mask)[0][:, 2:]
                torch.testing.assert_close(found, plain, atol=0.03, rtol=0.03)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.float32},
        {"length": attention.SHORT_ROW + 1},
        {"mask": torch.zeros(3, 4, 9, 9, dtype=torch.bfloat16)},
        {"options": {"position_bias": torch.zeros(3, 4, 9, 9, dtype=torch.bfloat16)}},
        {"options": {"dropout": 0.5}},
    ],
)
def test_elsewhere_the_usual_attention_is_left(fused, change):
    """float32, long rows, and what differs from head to head or is drawn at random."""
    parts = drawn(change.get("length", 9), change.get("dtype", torch.bfloat16))
    with attention_by_products():
        ALL_ATTENTION_FUNCTIONS["sdpa"](
            MODULE, *parts, change.get("mask"), **change.get("options", {})
        )
    assert len(fused) == 1


def test_the_usual_attention_returns_after_an_error():
    with pytest.raises(TypeError), attention_by_products():
        ALL_ATTENTION_FUNCTIONS["sdpa"]("too little")
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is PLAIN


def test_a_model_takes_products_while_the_context_lasts(fused):
    model = load_policy(resolve_model("random-tiny-llama"), torch.bfloat16)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(), attention_by_products():
        found = model(input_ids=ids).logits
    assert fused == []
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    assert len(fused) == model.config.num_hidden_layers
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    "change",
    [{"sliding_window": 8}, {"layer_types": ["linear_attention"]}, {"implementation": "x"}],
)
def test_models_that_a_mask_cannot_describe_are_known(change):
    config = SimpleNamespace(
        layer_types=change.get("layer_types", ["full_attention"]),
        sliding_window=change.get("sliding_window"),
        _attn_implementation=change.get("implementation", "sdpa"),
    )
    odd = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))
    assert not attention.sees_whole_past(odd)
    assert attention.sees_whole_past(load_policy(resolve_model("random-tiny-llama")))
