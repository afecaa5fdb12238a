"""SFT: what is learnt from, and that packing changes no loss and no gradient (float32)."""

from dataclasses import replace

import pytest
import torch
from datasets import Dataset

from rlhf_guide import sft
from rlhf_guide.chat import end_of_turn_id
from rlhf_guide.errors import DataError
from rlhf_guide.models import load_policy, load_tokenizer, resolve_model, weights_hash
from rlhf_guide.profiles import load_profile

SETTINGS = replace(
    load_profile("smoke").sft, lora_rank=0, max_length=64, batch_size=1, learning_rate=1e-3
)
WORDS = (
    *("sun", "rain", "wind", "snow", "fog", "hail"),
    *("frost", "storm", "cloud", "dew", "ice", "sky"),
)


def _demonstrations(count=12):
    """Conversations of different lengths: word i, answered with i + 1 words."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"Say {word}."},
                {"role": "assistant", "content": " ".join([word] * (index + 1))},
            ]
        }
        for index, word in enumerate(WORDS[:count])
    ]


@pytest.fixture(scope="module")
def tiny():
    return resolve_model("random-tiny-llama")


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(tiny)


@pytest.fixture(scope="module")
def dataset(tokenizer):
    return sft.build_dataset(tokenizer, _demonstrations(), SETTINGS)[0]


def _trainer(tiny, tokenizer, dataset, tmp_path, **changes):
    settings = replace(SETTINGS, **changes)
    model = load_policy(tiny, "float32").train()
    return sft.build_trainer(model, tokenizer, dataset, settings, tmp_path, 0, torch.float32)


def _loss_and_gradients(trainer):
    """Loss and gradients of the first optimiser step, through TRL's own collator and loss."""
    trainer.model.zero_grad()
    batches = list(trainer.get_train_dataloader())
    # The model shifts labels by one, so the first label of a row is never a target.
    items = sum(int((batch["labels"][:, 1:] != sft.IGNORED).sum()) for batch in batches)
    losses = []
    for batch in batches:
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)
        loss.backward()
        losses.append(loss.item())
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    return sum(losses), gradients


def _assert_close(one, other, tolerance=1e-5):
    assert one[0] == pytest.approx(other[0], abs=tolerance)
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], atol=tolerance, rtol=tolerance)


def test_packing_changes_neither_loss_nor_gradients(tiny, tokenizer, dataset, tmp_path):
    packed = _trainer(tiny, tokenizer, dataset, tmp_path, packing=True)
    single = _trainer(tiny, tokenizer, dataset, tmp_path, packing=False)
    assert len(packed.train_dataset) < len(single.train_dataset) == len(dataset)
    _assert_close(_loss_and_gradients(packed), _loss_and_gradients(single))


def test_one_by_eight_is_eight_by_one(tiny, tokenizer, dataset, tmp_path):
    eight = dataset.select(range(8))
    for packing in (False, True):
        big = _trainer(
            tiny, tokenizer, eight, tmp_path, packing=packing, batch_size=8, per_device_batch_size=8
        )
        small = _trainer(
            tiny, tokenizer, eight, tmp_path, packing=packing, batch_size=8, per_device_batch_size=1
        )
        assert small.args.gradient_accumulation_steps == 8
        _assert_close(_loss_and_gradients(big), _loss_and_gradients(small))


def test_one_by_eight_trains_to_the_same_weights(tiny, tokenizer, dataset, tmp_path):
    trained = []
    for per_device in (1, 8):
        trainer = _trainer(
            tiny,
            tokenizer,
            dataset.select(range(8)),
            tmp_path,
            packing=False,
            batch_size=8,
            per_device_batch_size=per_device,
        )
        trainer.train()
        trained.append(trainer.state.log_history[0]["loss"])
    assert trained[0] == pytest.approx(trained[1], abs=1e-5)


def test_no_token_sees_another_conversation(tiny, tokenizer, dataset, tmp_path):
    """Changing the first conversation of a block leaves the logits of the others alone."""
    trainer = _trainer(tiny, tokenizer, dataset, tmp_path, packing=True)
    batch = next(iter(trainer.get_train_dataloader()))
    assert "attention_mask" not in batch
    first = int(batch["cu_seq_lens_q"][1])
    assert first < batch["input_ids"].shape[1]
    other = batch["input_ids"].clone()
    other[:, :first] = 1000
    given = {"position_ids": batch["position_ids"], "use_cache": False}
    with torch.no_grad():
        before = trainer.model(batch["input_ids"], **given).logits[:, first:]
        after = trainer.model(other, **given).logits[:, first:]
        leaking = trainer.model(other, position_ids=batch["position_ids"], use_cache=True)
    torch.testing.assert_close(before, after, atol=1e-6, rtol=0)
    # With a cache transformers builds no block mask: the lesson's trap, and TRL's duty to avoid.
    assert (leaking.logits[:, first:] - before).abs().max() > 1e-4


def test_trainer_never_passes_a_cache(tiny, tokenizer, dataset, tmp_path):
    trainer = _trainer(tiny, tokenizer, dataset, tmp_path, packing=True)
    seen = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    trainer.train()
    assert seen
    for kwargs in seen:
        assert kwargs["use_cache"] is False
        assert kwargs.get("attention_mask") is None


def test_labels_are_the_answer_and_its_end(tokenizer):
    row = sft.tokenize(tokenizer, _demonstrations()[1]["messages"])
    learnt = [t for t, label in zip(row["input_ids"], row["labels"], strict=True) if label >= 0]
    assert tokenizer.convert_ids_to_tokens(learnt) == ["rain", "Ġrain", "<|im_end|>"]
    whole = sft.tokenize(tokenizer, _demonstrations()[1]["messages"], completion_only=False)
    assert whole["labels"] == whole["input_ids"]


def test_the_end_of_turn_reaches_the_loss_of_every_conversation(tiny, tokenizer, dataset, tmp_path):
    """After packing and collating, the stop token of each conversation is still a target."""
    stop = end_of_turn_id(tokenizer)
    for packing in (True, False):
        trainer = _trainer(tiny, tokenizer, dataset, tmp_path, packing=packing)
        batches = list(trainer.get_train_dataloader())
        targets = sum(int((batch["labels"] == stop).sum()) for batch in batches)
        assert targets == len(dataset)


def test_packing_keeps_every_token_once(tiny, tokenizer, dataset, tmp_path):
    packed = _trainer(tiny, tokenizer, dataset, tmp_path, packing=True).train_dataset
    assert all(sum(row["seq_lengths"]) == len(row["input_ids"]) <= 64 for row in packed)
    pieces = []
    for row in packed:
        start = 0
        for length in row["seq_lengths"]:
            pieces.append(tuple(row["input_ids"][start : start + length]))
            start += length
    assert sorted(pieces) == sorted(tuple(ids) for ids in dataset["input_ids"])


def test_fill_rate():
    packed = Dataset.from_dict({"input_ids": [[1] * 8, [1] * 4]})
    assert sft.fill_rate(packed, 8) == 0.75


def test_a_conversation_that_fits_no_block_is_dropped_and_counted(tokenizer):
    long = _demonstrations()[-1:] * 1
    long[0]["messages"][1]["content"] = "rain " * 200
    kept, counts = sft.build_dataset(tokenizer, _demonstrations(2) + long, SETTINGS)
    assert counts == {"demonstrations": 2, "dropped_too_long": 1}
    assert len(kept) == 2
    with pytest.raises(DataError, match="sft_max_length"):
        sft.build_dataset(tokenizer, long, SETTINGS)


@pytest.mark.parametrize("rank", [0, 4])
def test_training_learns_saves_and_repeats(tiny, tmp_path, rank, capsys):
    settings = replace(SETTINGS, lora_rank=rank, epochs=2, learning_rate=5e-3)
    results = [
        sft.train_sft(tiny, _demonstrations(), settings, tmp_path / name, 0, "float32")
        for name in ("one", "two")
    ]
    printed = capsys.readouterr().out
    assert "fine-tuning: 100%" in printed
    assert "{'loss'" not in printed
    losses = [row["loss"] for row in results[0]["history"]]
    assert losses[-1] < losses[0]
    assert results[0]["metrics"]["steps"] == len(losses)
    assert 0.5 < results[0]["metrics"]["fill"] <= 1
    assert weights_hash(tmp_path / "one") == weights_hash(tmp_path / "two") != weights_hash(tiny)
    model = load_policy(tmp_path / "one", "float32")
    assert "lora" not in " ".join(dict(model.named_parameters()))
    assert load_tokenizer(tmp_path / "one").pad_token == "<|endoftext|>"
