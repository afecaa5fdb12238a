"""Frozen layers read once: the same states, the same training, and a whole model afterwards."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import transformers
from dpo_world import PAIRS, SEED
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_guide import preference_model, reward_model
from rlhf_guide.comparisons import as_comparison
from rlhf_guide.frozen_layers import FrozenReading, frozen_layers_read_once
from rlhf_guide.models import load_policy, resolve_model
from rlhf_guide.preference_model import PreferenceScorer, train_preference_model
from rlhf_guide.profiles import load_profile
from rlhf_guide.reward_model import RewardScorer, train_reward_model

PAD = 3  # within the table of any test
SEQUENCES = [[5, 6, 7, 8], [5, 6, 9], [10, 11], [5, 6, 7, 8, 12]]


@pytest.fixture(scope="module")
def base():
    return resolve_model("random-tiny-llama")


@pytest.fixture(scope="module")
def model(base):
    return load_policy(base, torch.float32)


def last_states(model, sequences, pad):
    """After the final norm, at the last token of each sequence, padded on the right."""
    width = max(map(len, sequences))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in sequences])
    lengths = torch.tensor([len(row) for row in sequences])
    mask = (torch.arange(width) < lengths[:, None]).long()
    with torch.no_grad():
        hidden = model.base_model(ids, attention_mask=mask, use_cache=False).last_hidden_state
    return hidden[torch.arange(len(sequences)), lengths - 1]


sequences = st.lists(st.lists(st.integers(5, 8), min_size=1, max_size=9), min_size=1, max_size=12)


@settings(deadline=None, max_examples=30)
@given(sequences, st.sampled_from([0, PAD, 500]))
def test_what_is_left_of_the_model_gives_the_same_states(model, found, pad):
    """Wherever the row of padding lies, also behind all others, as large vocabularies have it."""
    before = last_states(model, found, PAD)
    with frozen_layers_read_once(model, 1, found, pad) as reading:
        ids = reading.sequences
        assert len(model.base_model.layers) == model.config.num_hidden_layers == 1
        torch.testing.assert_close(last_states(model, ids, pad), before, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last_states(model, found, PAD), before, atol=0, rtol=0)


def test_rows_of_the_table(model):
    """Equal beginnings are equal ids, and padding is the row of no token."""
    with frozen_layers_read_once(model, 1, SEQUENCES, PAD) as reading:
        table = model.base_model.embed_tokens.weight
        ids = reading.sequences
        assert [len(row) for row in ids] == [4, 3, 2, 5]
        assert ids[0] == ids[3][:4]
        assert ids[0][:2] == ids[1][:2]
        assert set().union(*ids) == set(range(len(table))) - {PAD}
        assert len(table) == 8 + 1  # different beginnings, and padding
        assert not table[PAD].any()
        assert not table.requires_grad
    assert reading.seconds > 0


def test_the_model_is_whole_again_after_an_error(model):
    layers, embedding = model.base_model.layers, model.base_model.embed_tokens
    names = list(model.state_dict())
    with (
        pytest.raises(RuntimeError, match="stopped"),
        frozen_layers_read_once(model, 1, SEQUENCES, PAD),
    ):
        raise RuntimeError("stopped")
    assert model.base_model.layers is layers
    assert model.base_model.embed_tokens is embedding
    assert model.config.num_hidden_layers == len(layers) == 2
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(
    "case", ["all layers", "as many as there are", "family", "dropout", "processes"]
)
def test_otherwise_nothing_changes(model, case, monkeypatch):
    adapted = {"all layers": 0, "as many as there are": 2}.get(case, 1)
    if case == "family":  # scales its embeddings on the way to the first layer
        monkeypatch.setattr(model.config, "model_type", "gemma")
    if case == "dropout":
        monkeypatch.setattr(model.config, "attention_dropout", 0.1)
    if case == "processes":
        monkeypatch.setenv("WORLD_SIZE", "2")
    layers = model.base_model.layers
    with frozen_layers_read_once(model, adapted, SEQUENCES, PAD) as reading:
        assert reading == FrozenReading(SEQUENCES, 0.0)
        assert model.base_model.layers is layers


@contextmanager
def every_step_reads_all(model, adapted, sequences, pad_id):
    yield FrozenReading(sequences, 0.0)


@pytest.mark.trains
@pytest.mark.parametrize("both_orders", [True, False])
def test_the_preference_model_trains_alike(base, tmp_path, monkeypatch, both_orders):
    part = replace(
        load_profile("smoke").preference_model,
        learning_rate=5e-3,
        epochs=2,
        batch_size=4,
        per_device_batch_size=4,
        packing=False,
        both_orders=both_orders,
        lora_layers=1,
    )

    def train(name):
        return train_preference_model(base, PAIRS, part, tmp_path / name, SEED)["history"]

    once = train("once")
    monkeypatch.setattr(preference_model, "frozen_layers_read_once", every_step_reads_all)
    always = train("always")
    assert once[-1]["loss"] != pytest.approx(once[0]["loss"], abs=1e-3)
    for ours, theirs in zip(once, always, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours["accuracy"] == theirs["accuracy"]
    comparisons = [as_comparison(pair) for pair in PAIRS]
    judged = [
        torch.tensor(PreferenceScorer(tmp_path / name, torch.float32).orders(comparisons))
        for name in ("once", "always")
    ]
    torch.testing.assert_close(*judged, atol=1e-4, rtol=1e-4)


@pytest.mark.trains
def test_the_reward_model_trains_alike(base, tmp_path, monkeypatch):
    part = replace(
        load_profile("smoke").reward_model, learning_rate=5e-3, epochs=2, lora_rank=4, lora_layers=1
    )

    def train(name):
        return train_reward_model(base, PAIRS, part, tmp_path / name, SEED)["history"]

    once = train("once")
    monkeypatch.setattr(reward_model, "frozen_layers_read_once", every_step_reads_all)
    always = train("always")
    assert once[-1]["loss"] != pytest.approx(once[0]["loss"], abs=1e-3)
    for ours, theirs in zip(once, always, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours["margin"] == pytest.approx(theirs["margin"], abs=1e-4)
    talks = [pair[side] for pair in PAIRS for side in ("chosen", "rejected")]
    scores = [
        torch.tensor(RewardScorer(tmp_path / name, torch.float32).score(talks))
        for name in ("once", "always")
    ]
    torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-4)


JUDGES = {
    "preference_model": (train_preference_model, {"packing": False}, "AutoModelForCausalLM"),
    "reward_model": (train_reward_model, {"lora_rank": 4}, "AutoModelForSequenceClassification"),
}


@pytest.mark.trains
@pytest.mark.parametrize("judge", JUDGES)
def test_training_reads_the_first_layer_once(base, tmp_path, monkeypatch, judge):
    """However many epochs: one row for all sequences, and steps that begin above it."""
    train, options, loader = JUDGES[judge]
    part = replace(getattr(load_profile("smoke"), judge), epochs=3, lora_layers=1, **options)
    read = []
    load = getattr(transformers, loader).from_pretrained

    def watched(*args, **options):
        found = load(*args, **options)
        first = found.base_model.layers[0]
        first.register_forward_pre_hook(lambda _module, args: read.append(args[0].shape[0]))
        return found

    monkeypatch.setattr(getattr(transformers, loader), "from_pretrained", watched)
    train(base, PAIRS, part, tmp_path, SEED)
    assert read == [1]
