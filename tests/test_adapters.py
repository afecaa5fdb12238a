"""Adapters that multiply in the type of their input: PEFT's numbers, float32 weights."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear

from rlhf_guide.adapters import PROJECTIONS, InputTypeLinear, lora_config
from rlhf_guide.models import load_policy, resolve_model

IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])


def adapted(config, dtype):
    """The tiny model with adapters that do something, and the loss of one batch through it."""
    torch.manual_seed(0)
    model = get_peft_model(load_policy(resolve_model("random-tiny-llama"), dtype), config)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = 0.05 * torch.randn_like(weight)
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    return model, loss


def gradients(model):
    return torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None])


@pytest.fixture
def peft_config():
    return LoraConfig(r=4, lora_alpha=8, target_modules=PROJECTIONS, task_type="CAUSAL_LM")


def test_in_float32_it_is_pefts_own_layer(peft_config):
    ours, loss = adapted(lora_config(4), "float32")
    theirs, expected = adapted(peft_config, "float32")
    assert any(isinstance(module, InputTypeLinear) for module in ours.modules())
    assert not any(isinstance(module, InputTypeLinear) for module in theirs.modules())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(ours), gradients(theirs))


def test_in_bfloat16_only_the_products_are_rounded(peft_config):
    ours, loss = adapted(lora_config(4), "bfloat16")
    theirs, expected = adapted(peft_config, "bfloat16")
    _, exact = adapted(lora_config(4), "float32")
    adapters = [weight for name, weight in ours.named_parameters() if "lora_" in name]
    assert {weight.dtype for weight in adapters} == {torch.float32}
    assert {weight.grad.dtype for weight in adapters} == {torch.float32}
    # As far from float32 as PEFT's way is, and along its gradient.
    assert abs(loss - exact) < 2 * abs(expected - exact) + 0.01
    assert torch.cosine_similarity(gradients(ours), gradients(theirs), dim=0) > 0.999


def test_no_wide_copy_of_an_activation_is_made():
    model, _ = adapted(lora_config(4), "bfloat16")
    layer = next(module for module in model.modules() if isinstance(module, InputTypeLinear))
    wide = []

    def note(module, given, made):
        wide.extend(tensor.dtype for tensor in (*given, made))

    for child in (layer.lora_A["default"], layer.lora_B["default"]):
        child.register_forward_hook(note)
    x = torch.randn(3, layer.in_features, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    assert set(wide) == {torch.bfloat16}
    wide.clear()
    Linear.forward(layer, x)
    assert torch.float32 in wide


def test_without_adapter_or_with_two_it_does_what_peft_does(peft_config):
    model, _ = adapted(lora_config(4), "float32")
    plain = load_policy(resolve_model("random-tiny-llama"), "float32")
    with model.disable_adapter():
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits)
    model.add_adapter("second", lora_config(4))
    for name, weight in model.named_parameters():
        if "lora_B.second" in name:
            weight.data = 0.05 * torch.randn_like(weight)
    one = model(IDS).logits
    model.base_model.set_adapter(["default", "second"])
    both = model(IDS).logits
    assert not torch.allclose(one, both)
    torch.testing.assert_close(model.merge_and_unload()(IDS).logits, both)


def test_what_is_saved_opens_with_pefts_own_layers(tmp_path):
    from peft import PeftModel

    model, _ = adapted(lora_config(4), "float32")
    model.save_pretrained(tmp_path)
    plain = load_policy(resolve_model("random-tiny-llama"), "float32")
    opened = PeftModel.from_pretrained(plain, str(tmp_path))
    assert not any(isinstance(module, InputTypeLinear) for module in opened.modules())
    torch.testing.assert_close(opened(IDS).logits, model(IDS).logits)
