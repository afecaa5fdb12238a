"""Reading what two answers share once: equal hidden states, gradients and losses."""

from dataclasses import replace

import pytest
import torch
from dpo_world import PAIRS, SEED
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_guide import dpo_trainer, preference_model, reward_model, shared_prompts
from rlhf_guide.dpo import train_dpo
from rlhf_guide.models import load_policy, resolve_model
from rlhf_guide.preference_model import train_preference_model
from rlhf_guide.profiles import load_profile
from rlhf_guide.reward_model import train_reward_model
from rlhf_guide.shared_prompts import pair_rows


@pytest.fixture(scope="module")
def base():
    return resolve_model("random-tiny-llama")


@pytest.fixture(scope="module")
def model(base):
    return load_policy(base, torch.float32)


def batch(pairs):
    """TRL's layout: chosen rows, then rejected ones, padded on the right."""
    rows = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return ids, mask


def test_one_pair_by_hand():
    """Chosen 5 6 7 8 and rejected 5 6 9: one row, in which 9 stands behind 8 and follows 6."""
    rows, mask, positions, places = pair_rows(*batch([([5, 6, 7, 8], [5, 6, 9])]))
    assert rows.tolist() == [[5, 6, 7, 8, 9]]
    assert positions.tolist() == [[0, 1, 2, 3, 2]]
    assert places.tolist() == [[0, 1, 2, 3], [0, 1, 4, 0]]
    seen = [[k for k in range(5) if mask[0, 0, q, k]] for q in range(5)]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4]]


tokens = st.lists(st.integers(5, 40), min_size=1, max_size=9)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.lists(st.integers(5, 40), max_size=9), tokens, tokens), min_size=1))
def test_every_token_stands_where_it_is_looked_for(pairs):
    ids, mask = batch([(prompt + a, prompt + b) for prompt, a, b in pairs])
    rows, seen, positions, places = pair_rows(ids, mask)
    both = torch.cat([rows, rows]).gather(1, places), torch.cat([positions] * 2).gather(1, places)
    real = mask.bool()
    assert torch.equal(both[0][real], ids[real])
    assert torch.equal(both[1][real], torch.arange(ids.shape[1]).expand_as(ids)[real])
    # Each real token sees exactly the tokens of its own conversation up to itself.
    for row, (pair, place) in enumerate(zip([*range(len(pairs))] * 2, places, strict=True)):
        own = place[: int(mask[row].sum())]
        for at, k in enumerate(own):
            visible = seen[pair, 0, k].nonzero().flatten().tolist()
            assert visible == sorted(own[: at + 1].tolist())


@pytest.mark.parametrize(
    "pairs",
    [
        [([5, 6, 7, 8, 9], [5, 6, 9]), ([5, 7], [5, 7, 8, 9, 10, 11])],  # one is the other's start
        [([5, 6, 7], [8, 9]), ([5], [6])],  # nothing in common
        [([5, 6, 7], [5, 6, 7]), ([5], [6])],  # everything in common
    ],
)
def test_hidden_states_and_gradients_do_not_change(model, pairs):
    ids, mask = batch(pairs)
    found = []
    for context in (shared_prompts.shared_prompts(model), shared_prompts.nullcontext()):
        with context:
            hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        model.zero_grad()
        (hidden[mask.bool()] ** 3).sum().backward()
        gradients = [p.grad.clone() for p in model.base_model.parameters()]
        found.append((hidden[mask.bool()], gradients))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    for ours, plain in zip(found[0][1], found[1][1], strict=True):
        assert torch.allclose(ours, plain, atol=1e-4 * float(plain.abs().max() + 1))


@pytest.mark.parametrize("read_at", [-1, -2])
def test_one_state_of_each_and_its_gradients_do_not_change(model, read_at):
    """Also where both are the same token of the row, whose gradient is then that of two."""
    ids, mask = batch([([5, 6, 7, 8, 9], [5, 6, 9]), ([5, 7], [5, 7]), ([5, 7], [8, 7, 8])])
    at, found, read = mask.sum(1) + read_at, [], []
    hook = model.base_model.layers[-1].mlp.gate_proj.register_forward_hook(
        lambda module, inputs, output: read.append(inputs[0].shape[:2])
    )
    for context in (shared_prompts.shared_prompts(model, read_at), shared_prompts.nullcontext()):
        with context:
            hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        model.zero_grad()
        ends = hidden[torch.arange(len(ids)), at]
        (ends**3).sum().backward()
        found.append([ends.detach(), *(p.grad.clone() for p in model.base_model.parameters())])
    hook.remove()
    assert read == [(1, 5), tuple(ids.shape)]
    for ours, plain in zip(*found, strict=True):
        assert torch.allclose(ours, plain, atol=1e-4 * float(plain.abs().max() + 1))


def test_a_common_prompt_is_read_once(model):
    ids, mask = batch([([*range(5, 25), 30], [*range(5, 25), 31, 32])] * 3)
    read = []
    hook = model.base_model.layers[0].register_forward_hook(
        lambda module, inputs, output: read.append(inputs[0].shape[:2])
    )
    with shared_prompts.shared_prompts(model):
        model.base_model(input_ids=ids, attention_mask=mask)
    hook.remove()
    assert read == [(3, 23)]  # instead of (6, 22)


def histories(monkeypatch, module, train):
    """A training's losses with common prompts read once, and as TRL does it."""
    shared = train("shared")
    monkeypatch.setattr(module, "shared_prompts", lambda *args, **_: shared_prompts.nullcontext())
    return shared, train("plain")


@pytest.mark.trains
def test_dpo_trains_alike(base, tmp_path, monkeypatch):
    part = replace(load_profile("smoke").dpo, learning_rate=5e-3, epochs=2, max_length=64)

    def train(name):
        return train_dpo(base, PAIRS, part, tmp_path / name, SEED, torch.float32)

    shared, plain = histories(monkeypatch, dpo_trainer, train)
    for ours, theirs in zip(shared["history"], plain["history"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours["logps/chosen"] == pytest.approx(theirs["logps/chosen"], abs=1e-3)
    for ours, theirs in zip(shared["reference_logps"], plain["reference_logps"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)


@pytest.mark.trains
def test_the_reward_model_trains_alike(base, tmp_path, monkeypatch):
    part = replace(load_profile("smoke").reward_model, learning_rate=5e-3, epochs=2)

    def train(name):
        return train_reward_model(base, PAIRS, part, tmp_path / name, SEED)["history"]

    shared, plain = histories(monkeypatch, reward_model, train)
    assert shared[-1]["loss"] != pytest.approx(shared[0]["loss"], abs=1e-3)
    for ours, theirs in zip(shared, plain, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours["margin"] == pytest.approx(theirs["margin"], abs=1e-4)


@pytest.mark.trains
def test_the_preference_model_trains_alike(base, tmp_path, monkeypatch):
    """Both orders of a pair in one row; the label of each stays at the end of its own."""
    part = replace(
        load_profile("smoke").preference_model,
        learning_rate=5e-3,
        batch_size=4,
        per_device_batch_size=4,
        packing=False,
    )

    def train(name):
        return train_preference_model(base, PAIRS, part, tmp_path / name, SEED)["history"]

    read = []
    rows = shared_prompts.pair_rows
    monkeypatch.setattr(
        shared_prompts, "pair_rows", lambda ids, mask: read.append(ids.shape) or rows(ids, mask)
    )
    shared, plain = histories(monkeypatch, preference_model, train)
    assert len(read) == len(shared)
    assert shared[-1]["loss"] != pytest.approx(shared[0]["loss"], abs=1e-3)
    for ours, theirs in zip(shared, plain, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours["accuracy"] == theirs["accuracy"]


def test_rows_of_a_pair_take_attention_by_products(base, monkeypatch):
    """In bfloat16, where it is faster: PyTorch's fused kernel is not called."""
    model = load_policy(base, torch.bfloat16)
    ids, mask = batch([([5, 6, 7, 8], [5, 6, 9])])
    monkeypatch.delattr(torch.nn.functional, "scaled_dot_product_attention")
    with shared_prompts.shared_prompts(model):
        model(input_ids=ids, attention_mask=mask)
