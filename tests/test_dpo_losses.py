"""Every loss that DPO can train with, in float32, against the formula written out."""

import math
from dataclasses import replace

import pytest
import torch
from dpo_world import PAIRS, SEED, four_vectors, log_probs

from rlhf_guide import dpo
from rlhf_guide.dpo import dpo_loss, encode_pairs, make_trainer, train_dpo
from rlhf_guide.dpo_losses import loss_arguments, loss_of_margin
from rlhf_guide.errors import DataError, ParameterError
from rlhf_guide.models import load_policy, load_tokenizer, resolve_model
from rlhf_guide.profiles import load_profile

BETA = 0.2
PLAIN = replace(
    load_profile("smoke").dpo,
    beta=BETA,
    learning_rate=5e-3,
    epochs=2,
    batch_size=8,
    per_device_batch_size=8,
    lora_rank=4,
    max_length=128,
)
VARIANTS = {
    "sigmoid": PLAIN,
    "smoothed": replace(PLAIN, label_smoothing=0.1),
    "sigmoid_norm": replace(PLAIN, loss="sigmoid_norm"),
    "ipo": replace(PLAIN, loss="ipo"),
}
WITH_REFERENCE = [
    {**pair, "reference": [*pair["chosen"][:-1], PAIRS[(i + 1) % 8]["rejected"][-1]]}
    for i, pair in enumerate(PAIRS)
]
variant = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)


@pytest.fixture(scope="module")
def base():
    return resolve_model("random-tiny-llama")


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(base)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """A policy that has left its reference."""
    folder = tmp_path_factory.mktemp("policy")
    train_dpo(base, PAIRS, PLAIN, folder, SEED, torch.float32)
    return folder


@pytest.fixture
def first_batch(base, tokenizer, tmp_path):
    """A function that gives loss and gradients of the first batch, as the trainer has them."""

    def compute(settings, adapter=None, pairs=PAIRS):
        rows, _ = encode_pairs(tokenizer, pairs, settings.max_length, settings.optimism_weight > 0)
        trainer = make_trainer(
            base, tokenizer, rows, settings, tmp_path, SEED, torch.float32, adapter
        )
        loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
        loss.backward()
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        return loss.item(), torch.cat([p.grad.flatten() for p in parameters])

    return compute


# --- the formulas -----------------------------------------------------------------------------


def at(margin, settings):
    return loss_of_margin(torch.tensor(margin), settings).item()


def test_losses_of_a_margin_by_hand():
    right = 1 / (1 + math.exp(-BETA * 3.0))
    assert at(3.0, VARIANTS["sigmoid"]) == pytest.approx(-math.log(right))
    assert at(3.0, VARIANTS["sigmoid_norm"]) == pytest.approx(-math.log(right))
    expected = -0.9 * math.log(right) - 0.1 * math.log(1 - right)
    assert at(3.0, VARIANTS["smoothed"]) == pytest.approx(expected)
    assert at(3.0, VARIANTS["ipo"]) == pytest.approx((3.0 - 2.5) ** 2)


def test_without_smoothing_it_is_equation_5():
    vectors = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    margin = (vectors[0] - vectors[2]) - (vectors[1] - vectors[3])
    assert torch.equal(loss_of_margin(margin, PLAIN), dpo_loss(*vectors, beta=BETA))


@pytest.mark.parametrize(
    ("name", "minimum"), [("smoothed", math.log(9) / BETA), ("ipo", 1 / (2 * BETA))]
)
def test_smoothing_and_ipo_stop_at_a_finite_margin(name, minimum):
    for step, sign in ((-1.0, -1), (1.0, 1)):
        margin = torch.tensor(minimum + step, requires_grad=True)
        loss_of_margin(margin, VARIANTS[name]).backward()
        assert margin.grad.sign() == sign
    margin = torch.tensor(minimum + 1, requires_grad=True)
    loss_of_margin(margin, PLAIN).backward()
    assert margin.grad < 0  # plain DPO always wants more


def test_smoothing_with_another_loss_is_refused():
    for loss in ("ipo", "sigmoid_norm"):
        with pytest.raises(ParameterError, match=f"dpo_loss='{loss}'"):
            load_profile("smoke", dpo_loss=loss, dpo_label_smoothing=0.1)
    with pytest.raises(ParameterError, match=r"at most 0\.49"):
        load_profile("smoke", dpo_label_smoothing=0.5)


# --- as TRL trains them -----------------------------------------------------------------------


@variant
def test_first_loss_is_that_of_margin_zero(first_batch, settings):
    loss, _ = first_batch(settings)
    assert loss == pytest.approx(at(0.0, settings), rel=1e-5)
    expected = 1 / (4 * BETA**2) if settings.loss == "ipo" else math.log(2)
    assert at(0.0, settings) == pytest.approx(expected)


@variant
def test_trl_trains_the_loss_written_out(first_batch, base, tokenizer, adapter, settings):
    rows, _ = encode_pairs(tokenizer, PAIRS, PLAIN.max_length)
    chosen, rejected, *reference = four_vectors(
        load_policy(base, torch.float32, adapter), load_policy(base, torch.float32), rows
    )
    ratios = [chosen - reference[0], rejected - reference[1]]
    if settings.loss != "sigmoid":
        for ratio, side in zip(ratios, ("chosen_ids", "rejected_ids"), strict=True):
            ratio /= torch.tensor([len(row[side]) for row in rows])
    margin = ratios[0] - ratios[1]
    expected = loss_of_margin(margin, settings).mean().item()
    assert abs(expected - at(0.0, settings)) > 1e-3  # the policy has left margin zero
    assert first_batch(settings, adapter)[0] == pytest.approx(expected, abs=1e-5)


def test_the_defaults_are_trl_s_plain_dpo_bit_for_bit(first_batch, adapter, monkeypatch):
    ours, our_gradient = first_batch(PLAIN, adapter, WITH_REFERENCE)
    monkeypatch.setattr(dpo, "loss_arguments", lambda settings: {})
    theirs, their_gradient = first_batch(PLAIN, adapter)
    assert ours == theirs
    assert torch.equal(our_gradient, their_gradient)


def test_cached_reference_equals_a_live_one(first_batch, adapter, monkeypatch):
    cached, gradient = first_batch(PLAIN, adapter)
    arguments = dpo._arguments

    def live(*given):
        found = arguments(*given)
        found.precompute_ref_log_probs = False
        return found

    monkeypatch.setattr(dpo, "_arguments", live)
    loss, live_gradient = first_batch(PLAIN, adapter)
    assert loss == pytest.approx(cached, abs=1e-6)
    assert torch.allclose(live_gradient, gradient, atol=1e-6)


# --- the two further terms --------------------------------------------------------------------


def test_the_optimistic_term_is_the_log_probability_of_the_reference_s_answers(
    first_batch, base, tokenizer, adapter
):
    plain, _ = first_batch(PLAIN, adapter)
    loss, _ = first_batch(replace(PLAIN, optimism_weight=0.01), adapter, WITH_REFERENCE)
    rows, _ = encode_pairs(tokenizer, WITH_REFERENCE, PLAIN.max_length, with_reference=True)
    policy = load_policy(base, torch.float32, adapter)
    term = log_probs(policy, rows, "reference_ids").mean().item()
    assert loss - plain == pytest.approx(0.01 * term, abs=1e-4)


def test_optimism_lowers_what_nll_raises(first_batch, tokenizer, adapter):
    """With the chosen answer as the reference's, the two terms pull exactly against each other."""
    one = replace(PLAIN, batch_size=1, per_device_batch_size=1)
    pairs = [{**PAIRS[0], "reference": PAIRS[0]["chosen"]}]
    _, plain = first_batch(one, adapter, pairs)
    _, raised = first_batch(replace(one, nll_weight=1.0), adapter, pairs)
    _, lowered = first_batch(replace(one, optimism_weight=1.0), adapter, pairs)
    tokens = len(
        encode_pairs(tokenizer, pairs, PLAIN.max_length)[0][0]["chosen_ids"]
    )  # NLL is a mean over them
    assert (raised - plain).abs().max() > 1e-3
    assert torch.allclose(lowered - plain, -tokens * (raised - plain), rtol=1e-3, atol=1e-4)


def test_training_with_optimism_takes_probability_from_the_reference_s_answers(base, tmp_path):
    settings = replace(PLAIN, optimism_weight=1.0, learning_rate=2e-2, epochs=4)
    found = train_dpo(base, WITH_REFERENCE, settings, tmp_path, SEED, torch.float32)
    logged = [step["logps/reference"] for step in found["history"] if "logps/reference" in step]
    assert len(logged) == 4
    assert logged[-1] < logged[0] - 1


def test_pairs_without_the_reference_s_answer_are_refused(base, tmp_path):
    with pytest.raises(DataError, match=r"'p0' has no answer of the reference.*optimism_weight"):
        train_dpo(base, PAIRS, replace(PLAIN, optimism_weight=0.1), tmp_path, SEED, torch.float32)


def test_terms_join_any_loss():
    both = loss_arguments(replace(VARIANTS["smoothed"], nll_weight=0.5))
    assert both["loss_type"] == ["sigmoid", "robust", "sft"]
    assert both["loss_weights"] == pytest.approx([1.8, -0.8, 0.5])
    assert loss_arguments(VARIANTS["ipo"])["loss_type"] == ["ipo"]
