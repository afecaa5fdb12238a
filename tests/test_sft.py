"""SFT: what is learnt from, and that packing changes no loss and no gradient (float32)."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from test_chat import chatml, llama3, no_system  # noqa: F401 (three families of templates)
from transformers import AutoTokenizer, TrainerCallback

from rlhf_guide import sft
from rlhf_guide.chat import CHATML, end_of_turn_id
from rlhf_guide.errors import DataError, TemplateError
from rlhf_guide.models import load_policy, load_tokenizer, resolve_model, weights_hash
from rlhf_guide.profiles import SFT_PRESETS, load_profile
from rlhf_guide.workspace import open_run

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
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    return sum(losses), {name: p.grad.clone() for name, p in trained.items()}


def _assert_close(one, other, tolerance=1e-5):
    assert one[0] == pytest.approx(other[0], abs=tolerance)
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("rank", [0, 4])
def test_packing_changes_neither_loss_nor_gradients(tiny, tokenizer, dataset, tmp_path, rank):
    torch.manual_seed(0)  # the adapters' first values
    packed = _trainer(tiny, tokenizer, dataset, tmp_path, packing=True, lora_rank=rank)
    torch.manual_seed(0)
    single = _trainer(tiny, tokenizer, dataset, tmp_path, packing=False, lora_rank=rank)
    assert len(packed.train_dataset) < len(single.train_dataset) == len(dataset)
    ours, theirs = _loss_and_gradients(packed), _loss_and_gradients(single)
    assert max(gradient.abs().max() for gradient in ours[1].values()) > 1e-3
    _assert_close(ours, theirs)


def test_a_packed_step_of_training_is_the_unpacked_step(tiny, tokenizer, dataset, tmp_path):
    """The same through `train` itself: one optimiser step over everything, as TRL logs it."""
    logged = []
    for packing, size in ((True, None), (False, len(dataset))):
        probe = _trainer(tiny, tokenizer, dataset, tmp_path, packing=packing)
        size = size or len(probe.train_dataset)
        trainer = _trainer(tiny, tokenizer, dataset, tmp_path, packing=packing, batch_size=size)
        trainer.train()
        assert trainer.state.global_step == 1
        logged.append(trainer.state.log_history[0])
    assert logged[0]["loss"] == pytest.approx(logged[1]["loss"], abs=1e-5)
    assert logged[0]["grad_norm"] == pytest.approx(logged[1]["grad_norm"], abs=1e-5)


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


# Counted by hand from the tables in test_chat.py: all tokens, and those that carry loss.
MASK_COUNTS = {"chatml": (35, 5), "llama3": (37, 5), "no_system": (13, 3)}
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello you"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Thanks"},
]


@pytest.mark.parametrize("family", MASK_COUNTS)
def test_labels_that_reach_the_loss_are_as_many_as_counted_by_hand(tiny, tmp_path, family, request):
    tokenizer = request.getfixturevalue(family)
    messages = CHAT[1:3] if family == "no_system" else CHAT
    dataset, _ = sft.build_dataset(tokenizer, [{"messages": messages}] * 3, SETTINGS)
    tokens, learnt = MASK_COUNTS[family]
    for packing in (True, False):
        trainer = _trainer(tiny, tokenizer, dataset, tmp_path, packing=packing)
        batches = list(trainer.get_train_dataloader())
        assert sum(batch["input_ids"].numel() for batch in batches) == 3 * tokens
        assert sum(int((batch["labels"] != sft.IGNORED).sum()) for batch in batches) == 3 * learnt
    whole, _ = sft.build_dataset(
        tokenizer, [{"messages": messages}], replace(SETTINGS, completion_only=False)
    )
    assert sum(label != sft.IGNORED for label in whole["labels"][0]) == tokens


def test_the_end_of_turn_is_learnt_where_padding_was_the_end_of_sequence(tiny, tmp_path):
    """Such a tokenizer gets another padding token, and batches that are padded keep the end."""
    folder = tmp_path / "tokenizer"
    published = AutoTokenizer.from_pretrained(tiny)
    published.pad_token = published.eos_token
    published.save_pretrained(folder)
    with pytest.raises(TemplateError, match="padding token"):
        sft.build_dataset(AutoTokenizer.from_pretrained(folder), _demonstrations(), SETTINGS)
    tokenizer = load_tokenizer(folder)
    dataset, _ = sft.build_dataset(tokenizer, _demonstrations(), SETTINGS)
    trainer = _trainer(
        tiny, tokenizer, dataset, tmp_path, packing=False, batch_size=4, per_device_batch_size=4
    )
    batches = list(trainer.get_train_dataloader())
    assert any((batch["input_ids"] == tokenizer.pad_token_id).any() for batch in batches)
    stop = end_of_turn_id(tokenizer)
    assert sum(int((batch["labels"] == stop).sum()) for batch in batches) == len(dataset)
    assert not any((batch["labels"] == tokenizer.pad_token_id).any() for batch in batches)


def test_what_cannot_be_learnt_from_is_dropped_and_counted(tokenizer):
    long = _demonstrations()[-1]
    long["messages"][1]["content"] = "rain " * 200
    silent, mute = _demonstrations(2)
    silent["messages"][1]["content"] = " \n"
    mute["messages"].pop()
    rows = [*_demonstrations(2), long, silent, mute, {"messages": []}]
    kept, counts = sft.build_dataset(tokenizer, rows, SETTINGS)
    assert counts == {
        "demonstrations": 2,
        "dropped_empty": 2,
        "dropped_no_answer": 1,
        "dropped_too_long": 1,
    }
    assert len(kept) == 2
    with pytest.raises(DataError, match="sft_max_length"):
        sft.build_dataset(tokenizer, [long], SETTINGS)


def test_a_conversation_of_exactly_one_block_is_kept(tokenizer):
    rows = _demonstrations(2)
    length = len(sft.tokenize(tokenizer, rows[1]["messages"])["input_ids"])
    counts = [
        sft.build_dataset(tokenizer, rows, replace(SETTINGS, max_length=block))[1]
        for block in (length, length - 1)
    ]
    assert [count["dropped_too_long"] for count in counts] == [0, 1]


def test_a_tokenizer_that_would_corrupt_training_is_refused(tokenizer):
    changes = {
        "no chat template": {"chat_template": None},
        "padding token": {"pad_token": None},
        "twice": {"chat_template": "{{ bos_token }}{{ bos_token }}" + CHATML},
    }
    for message, change in changes.items():
        broken = deepcopy(tokenizer)
        for name, value in change.items():
            setattr(broken, name, value)
        with pytest.raises(TemplateError, match=message):
            sft.build_dataset(broken, _demonstrations(), SETTINGS)


def test_a_conversation_that_the_template_rewrites_is_named(tokenizer):
    """Some templates drop what earlier turns said: the second turn's prompt is then no prefix."""
    rewriting = deepcopy(tokenizer)
    rewriting.chat_template = CHATML.replace(
        "message['content'] +",
        "(message['content'] if message['role'] == 'user' or loop.last else 'gone') +",
    )
    turns = [{"messages": CHAT[1:3], "id": "one"}, {"messages": CHAT[1:], "id": "two"}]
    with pytest.raises(TemplateError, match=r"demonstration 1 \(id two\).*not a prefix"):
        sft.build_dataset(rewriting, turns, SETTINGS)


def test_presets_are_the_published_recipes():
    paper, first, second = (
        load_profile("paper", **SFT_PRESETS[name]).sft
        for name in ("paper", "authors_v1", "authors_v2")
    )
    for recipe in (paper, first, second):
        assert (recipe.learning_rate, recipe.scheduler) == (2e-5, "cosine")
        assert recipe.packing
        assert recipe.lora_rank == 0
    assert (paper.max_length, paper.batch_size, paper.epochs) == (8192, 32, 1)
    assert paper.warmup_ratio == 0.03
    assert first == replace(paper, max_length=4096, completion_only=False)
    assert second == replace(paper, batch_size=128, epochs=3, warmup_ratio=0.05)
    assert second.completion_only


class _Kill(TrainerCallback):
    """Stops the process' work in the middle of training, as Ctrl-C would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("rank", [0, 4])
def test_a_killed_run_goes_on_to_the_same_weights(tiny, tmp_path, rank, monkeypatch):
    settings = replace(SETTINGS, lora_rank=rank, epochs=2)

    def train(name):
        return sft.train_sft(tiny, _demonstrations(), settings, tmp_path / name, 0, "float32", 2)

    whole = train("whole")
    with monkeypatch.context() as patched:
        patched.setattr(sft, "show_progress", lambda trainer, _: trainer.add_callback(_Kill(5)))
        with pytest.raises(KeyboardInterrupt):
            train("killed")
    assert (tmp_path / "killed" / "checkpoint-4").is_dir()
    (tmp_path / "killed" / "checkpoint-6").mkdir()  # a second kill, while the next was written
    resumed = train("killed")
    assert weights_hash(tmp_path / "killed") == weights_hash(tmp_path / "whole")
    assert [r["loss"] for r in resumed["history"]] == [r["loss"] for r in whole["history"]]
    assert not list((tmp_path / "killed").glob("checkpoint-*"))


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


def test_training_takes_attention_by_products(tiny, tmp_path, monkeypatch):
    """In bfloat16 on a CPU; PyTorch's fused kernel is called in float32 alone."""
    calls, plain = [], torch.nn.functional.scaled_dot_product_attention

    def watched(query, *rest, **options):
        calls.append(query.dtype)
        return plain(query, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    settings = replace(SETTINGS, lora_rank=4)
    for name, dtype in (("a", "bfloat16"), ("b", "float32")):
        sft.train_sft(tiny, _demonstrations(), settings, tmp_path / name, 0, dtype)
    assert set(calls) == {torch.float32}


def test_a_smaller_sampling_batch_does_not_undo_the_training(tmp_path):
    """Its error message says that what is finished stays; see `generation.answer_config`."""
    configs = []
    for size in (384, 2):
        ws = open_run(load_profile("smoke", generation_batch_size=size), tmp_path)
        ws.stage("data", {}).finish()
        configs.append(sft.open_stage(ws).config)
    assert configs[0] == configs[1]
