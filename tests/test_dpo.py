"""DPO on a tiny random model, in float32: the loss, the fixed reference, the warm start."""

import json
import math
from dataclasses import replace

import pytest
import torch
from dpo_world import NEW_PAIRS, PAIRS, SEED, four_vectors, log_probs, pair
from peft import PeftModel, load_peft_weights
from trl import DPOTrainer

from rlhf_guide import dpo
from rlhf_guide.dpo import dpo_loss, encode_pairs, make_trainer, summarise, train_dpo
from rlhf_guide.dpo_trainer import PairTrainer
from rlhf_guide.errors import DataError
from rlhf_guide.models import load_policy, load_tokenizer, resolve_model, weights_hash
from rlhf_guide.policies import policy_location
from rlhf_guide.profiles import load_profile


@pytest.fixture(scope="module")
def base():
    return resolve_model("random-tiny-llama")


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(base)


@pytest.fixture(scope="module")
def settings():
    return replace(
        load_profile("smoke").dpo,
        learning_rate=5e-3,
        epochs=2,
        batch_size=4,
        per_device_batch_size=4,
        lora_rank=4,
        max_length=64,
    )


def train(base, settings, folder, pairs=PAIRS, **options):
    return train_dpo(base, pairs, settings, folder, SEED, torch.float32, **options)


@pytest.fixture(scope="module")
def first(base, settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpo") / "first"
    return folder, train(base, settings, folder)


# --- the loss ---------------------------------------------------------------------------------


def test_dpo_loss_by_hand():
    """Eq. 5 at margin zero, at a hand-computed margin, and its symmetry."""
    zero = torch.zeros(1)
    assert dpo_loss(zero, zero, zero, zero, 0.1).item() == pytest.approx(math.log(2))
    a, b, c, d = (torch.tensor([value]) for value in (-10.0, -12.0, -11.0, -9.0))
    expected = math.log(1 + math.exp(-0.1 * ((-10 + 11) - (-12 + 9))))
    assert dpo_loss(a, b, c, d, 0.1).item() == pytest.approx(expected)
    both = torch.exp(-dpo_loss(a, b, c, d, 0.1)) + torch.exp(-dpo_loss(b, a, d, c, 0.1))
    assert both.item() == pytest.approx(1.0)  # P(a ≻ b) + P(b ≻ a)


def test_dpo_loss_pulls_the_two_answers_apart_equally():
    logps = torch.zeros(2, 3, requires_grad=True)
    dpo_loss(logps[0], logps[1], torch.zeros(3), torch.zeros(3), 0.1).sum().backward()
    assert torch.allclose(logps.grad[0], torch.full((3,), -0.05))
    assert torch.allclose(logps.grad[1], torch.full((3,), 0.05))


def test_minimiser_is_the_closed_form_optimum():
    """Eq. 3: on an enumerable answer set, DPO with BT labels recovers π* ∝ π0 exp(r / β)."""
    beta, generator = 0.5, torch.Generator().manual_seed(0)
    reward = torch.rand(5, generator=generator)
    reference = torch.randn(5, generator=generator).log_softmax(0)
    logits = torch.zeros(5, requires_grad=True)
    i, j = torch.cartesian_prod(torch.arange(5), torch.arange(5)).T
    weight = torch.sigmoid(reward[i] - reward[j])  # how often i is preferred to j, Eq. 1
    optimiser = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-9)

    def closure():
        optimiser.zero_grad()
        policy = logits.log_softmax(0)
        loss = (weight * dpo_loss(policy[i], policy[j], reference[i], reference[j], beta)).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    optimum = (reference + reward / beta).softmax(0)
    assert torch.allclose(logits.softmax(0), optimum, atol=1e-4)


def test_first_loss_is_ln_2(first):
    history = first[1]["history"]
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert history[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-4)
    assert history[-1]["loss"] < history[0]["loss"]


def test_a_saved_adapter_names_no_path_and_its_modules_in_order(base, first):
    names = {path.name for path in first[0].iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    text = (first[0] / "adapter_config.json").read_text()
    assert str(base.parent) not in text
    modules = json.loads(text)["target_modules"]
    assert modules == sorted(modules)


def test_dpo_loss_equals_what_trl_logs(base, tokenizer, settings, first, tmp_path):
    folder, result = first
    rows, _ = encode_pairs(tokenizer, PAIRS, settings.max_length)
    # One step over all pairs, starting at a policy that differs from its reference.
    whole = replace(settings, batch_size=8, per_device_batch_size=8, epochs=1)
    logged = train(base, whole, tmp_path, initial_adapter=folder)["history"][0]
    vectors = four_vectors(
        load_policy(base, torch.float32, folder), load_policy(base, torch.float32), rows
    )
    ours = dpo_loss(*vectors, beta=whole.beta).mean().item()
    margin = ((vectors[0] - vectors[2]) - (vectors[1] - vectors[3])).mean().item()
    assert abs(ours - math.log(2)) > 0.01
    assert logged["loss"] == pytest.approx(ours, abs=1e-4)
    assert logged["rewards/margins"] == pytest.approx(whole.beta * margin, abs=1e-4)
    assert logged["logps/chosen"] == pytest.approx(vectors[0].mean().item(), abs=1e-3)
    assert logged["logps/rejected"] == pytest.approx(vectors[1].mean().item(), abs=1e-3)
    assert torch.allclose(
        torch.tensor(result["reference_logps"]).T, torch.stack(vectors[2:]), atol=1e-3
    )


def test_small_batches_accumulate_to_the_large_one(base, settings, first, tmp_path):
    small = train(base, replace(settings, per_device_batch_size=1), tmp_path)["history"]
    large = first[1]["history"]
    assert small[0]["loss"] == pytest.approx(large[0]["loss"], abs=1e-5)
    assert [step["step"] for step in small] == [step["step"] for step in large]


# --- the reference ----------------------------------------------------------------------------


def test_reference_stays_over_two_warm_started_iterations(base, settings, first, tmp_path):
    folder, result = first
    before = weights_hash(base)
    second = train(base, settings, tmp_path / "2", NEW_PAIRS, initial_adapter=folder)
    # The first pairs once more, now two policies later: π0 must rate them as at the beginning.
    third = train(base, settings, tmp_path / "3", PAIRS, initial_adapter=tmp_path / "2")
    assert weights_hash(base) == before
    assert {run["metrics"]["reference_hash"] for run in (result, second, third)} == {before}
    assert torch.allclose(
        torch.tensor(third["reference_logps"]), torch.tensor(result["reference_logps"]), atol=1e-4
    )
    # And the policy has left it: otherwise the comparison would prove nothing.
    assert abs(third["metrics"]["start_chosen_log_ratio"]) > 0.1


def test_trl_would_move_the_reference_with_a_loaded_adapter(
    base, tokenizer, settings, first, tmp_path
):
    """The trap that `make_trainer` avoids: given a PeftModel, TRL refers to its adapter's copy."""
    folder, result = first
    model = PeftModel.from_pretrained(load_policy(base, torch.float32), folder, is_trainable=True)
    rows, _ = encode_pairs(tokenizer, PAIRS, settings.max_length)
    trapped = PairTrainer(
        model=model,
        args=dpo._arguments(settings, tmp_path, SEED, torch.float32),
        train_dataset=dpo.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    assert isinstance(trapped, DPOTrainer)
    assert "ref" in trapped.model.peft_config
    moved = torch.tensor(dpo._reference_logps(trapped))
    assert (moved - torch.tensor(result["reference_logps"])).abs().max() > 0.1
    ours = make_trainer(
        base, tokenizer, rows, settings, tmp_path, SEED, torch.float32, initial_adapter=folder
    )
    assert "ref" not in ours.model.peft_config
    stayed = torch.tensor(dpo._reference_logps(ours))
    assert torch.allclose(stayed, torch.tensor(result["reference_logps"]), atol=1e-4)


def test_start_weights_are_the_previous_adapter(base, tokenizer, settings, first, tmp_path):
    folder, _ = first
    rows, _ = encode_pairs(tokenizer, PAIRS, settings.max_length)
    trainer = make_trainer(
        base, tokenizer, rows, settings, tmp_path, SEED, torch.float32, initial_adapter=folder
    )
    saved = load_peft_weights(str(folder), device="cpu")
    parameters = dict(trainer.model.named_parameters())
    assert len(saved) == sum("lora_" in name for name in parameters)
    for name, weight in saved.items():
        ours = parameters[name.replace(".weight", ".default.weight")]
        assert ours.requires_grad
        assert torch.equal(ours, weight)


def test_warm_start_begins_where_the_last_iteration_ended(base, settings, first, tmp_path):
    folder, result = first
    again = train(base, settings, tmp_path, initial_adapter=folder)
    assert again["history"][0]["loss"] < math.log(2) - 0.01
    assert result["metrics"]["start_loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_adapter_of_another_rank_is_refused(base, settings, first, tmp_path):
    with pytest.raises(DataError, match="dpo_lora_rank"):
        train(base, replace(settings, lora_rank=2), tmp_path, initial_adapter=first[0])


def test_saved_adapter_is_the_trained_policy(base, settings, first):
    folder, _ = first
    model, adapter = policy_location(base, folder)
    assert (model, adapter) == (base, folder)
    trained = load_policy(model, torch.float32, adapter)
    assert weights_hash(trained) != weights_hash(base)


def test_merged_policy_is_a_whole_model(base, settings, first, tmp_path):
    result = train(base, settings, tmp_path / "whole", merge=True)
    assert policy_location(base, tmp_path / "whole") == (tmp_path / "whole", None)
    assert result["history"] == first[1]["history"]
    merged = load_policy(tmp_path / "whole", torch.float32)
    adapted = load_policy(base, torch.float32, first[0])
    for ours, theirs in zip(merged.parameters(), adapted.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


# --- options ----------------------------------------------------------------------------------


def test_nll_weight_adds_the_chosen_answers_nll(base, tokenizer, settings, tmp_path):
    whole = replace(settings, batch_size=8, per_device_batch_size=8, epochs=1, nll_weight=0.5)
    arguments = dpo._arguments(whole, tmp_path, SEED, torch.float32)
    assert (arguments.loss_type, arguments.loss_weights) == (["sigmoid", "sft"], [1.0, 0.5])
    rows, _ = encode_pairs(tokenizer, PAIRS, whole.max_length)
    chosen = log_probs(load_policy(base, torch.float32), rows, "chosen_ids")
    nll = -chosen.sum().item() / sum(len(row["chosen_ids"]) for row in rows)
    logged = train(base, whole, tmp_path)["history"][0]
    assert logged["loss"] == pytest.approx(math.log(2) + 0.5 * nll, abs=1e-4)
    assert dpo._arguments(settings, tmp_path, SEED, torch.float32).loss_type == ["sigmoid"]


def test_full_fine_tuning_and_its_warm_start(base, settings, tmp_path):
    full = replace(settings, lora_rank=0, learning_rate=1e-3)
    one = train(base, full, tmp_path / "1")
    two = train(base, full, tmp_path / "2", initial_adapter=tmp_path / "1")
    assert one["history"][0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert one["history"][-1]["loss"] < math.log(2)
    assert two["history"][0]["loss"] < math.log(2) - 0.001
    assert one["metrics"]["reference_hash"] == two["metrics"]["reference_hash"]
    assert torch.allclose(
        torch.tensor(one["reference_logps"]), torch.tensor(two["reference_logps"]), atol=1e-4
    )
    assert policy_location(base, tmp_path / "2") == (tmp_path / "2", None)


def test_training_repeats_exactly_in_silence_and_plain_json(
    base, settings, first, tmp_path, capsys
):
    again = train(base, settings, tmp_path)
    assert capsys.readouterr().out == ""
    assert json.loads(json.dumps(again))["history"] == first[1]["history"]
    ours, theirs = (load_peft_weights(str(f), device="cpu") for f in (tmp_path, first[0]))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- tokens -----------------------------------------------------------------------------------


def test_cut_answers_are_not_taught_to_stop(tokenizer):
    finished = pair(0)
    cut = pair(0, chosen_finished=False, rejected_finished=True)
    stored = pair(0, chosen_finish_reason="stop", rejected_finish_reason="length")
    rows, _ = encode_pairs(tokenizer, [finished, cut, stored], 64)
    end = tokenizer.eos_token_id
    assert [row["chosen_ids"][-1] == end for row in rows] == [True, False, True]
    assert [row["rejected_ids"][-1] == end for row in rows] == [True, True, False]
    assert rows[1]["chosen_ids"] == rows[0]["chosen_ids"][:-1]


def test_long_answers_lose_their_end_and_their_stop(tokenizer):
    long = pair(0)
    long["chosen"] = [*long["chosen"][:-1], {"role": "assistant", "content": "word " * 80}]
    rows, counts = encode_pairs(tokenizer, [long], 40)
    assert counts["cut_to_max_length"] == 1
    assert len(rows[0]["prompt_ids"]) + len(rows[0]["chosen_ids"]) <= 40
    assert rows[0]["chosen_ids"][-1] != tokenizer.eos_token_id
    assert rows[0]["rejected_ids"][-1] == tokenizer.eos_token_id


def test_long_prompts_lose_their_beginning(tokenizer):
    long = pair(0)
    question = [{"role": "user", "content": "word " * 80 + "last?"}]
    long = {**long, **{s: [*question, long[s][-1]] for s in ("chosen", "rejected")}}
    rows, counts = encode_pairs(tokenizer, [long, pair(1)], 40)
    assert (counts["prompts_cut"], counts["cut_to_max_length"]) == (1, 0)
    assert len(rows[0]["prompt_ids"]) + len(rows[0]["chosen_ids"]) <= 40
    assert "last?" in tokenizer.decode(rows[0]["prompt_ids"])
    assert rows[0]["chosen_ids"][-1] == tokenizer.eos_token_id


def test_pairs_of_equal_tokens_are_dropped_and_an_empty_set_refused(
    base, tokenizer, settings, tmp_path
):
    same = pair(0)
    same["rejected"] = same["chosen"]
    rows, counts = encode_pairs(tokenizer, [same, pair(1)], 64)
    assert [row["row"] for row in rows] == [1]
    assert counts["dropped_same_tokens"] == 1
    with pytest.raises(DataError, match="None of the 1 preference pairs"):
        train(base, settings, tmp_path, [same])


def test_summary_reads_first_step_and_last_quarter():
    steps = [
        {"loss": 0.7 - 0.1 * i, "rewards/margins": 0.1 * i, "rewards/accuracies": 0.5,
         "rewards/chosen": 0.2 * i, "rewards/rejected": 0.1 * i,
         "logps/chosen": -10.0, "logps/rejected": -20.0}
        for i in range(4)
    ]  # fmt: skip
    found = summarise(steps, beta=0.1)
    assert found["steps"] == 4
    assert (found["start_loss"], found["end_loss"]) == (pytest.approx(0.7), pytest.approx(0.4))
    assert found["end_chosen_log_ratio"] == pytest.approx(6.0)


# --- cheaper logits ----------------------------------------------------------------------------


@pytest.mark.parametrize(("softcap", "scale", "temperature"), [(None, 1.0, 1.0), (3.0, 0.5, 0.7)])
@pytest.mark.parametrize("tile", [4, 100])
def test_log_probs_and_gradients_are_those_of_trls_tiles(
    monkeypatch, softcap, scale, temperature, tile
):
    from trl.trainer import utils as trl_utils

    from rlhf_guide import dpo_trainer

    monkeypatch.setattr(dpo_trainer, "TILE", tile)
    torch.manual_seed(0)
    targets, found = torch.randint(50, (10,)), []
    hidden, weight, bias = torch.randn(10, 8), torch.randn(50, 8), torch.randn(50)
    for function in (dpo_trainer._LogProbs, trl_utils._ChunkedLogProbFunction):
        given = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
        options = (targets, temperature, 16, softcap, scale, ("log_probs",))
        logps = function.apply(*given, *options)[0]
        (logps * torch.arange(10)).sum().backward()
        found.append([logps.detach(), *(tensor.grad for tensor in given)])
    for ours, trls in zip(*found, strict=True):
        torch.testing.assert_close(ours, trls)


def test_what_was_not_computed_is_not_logged(first):
    from rlhf_guide.dpo_trainer import NOT_COMPUTED

    logged = set(first[1]["history"][0])
    assert not logged & set(NOT_COMPUTED)
    assert {"loss", "rewards/margins", "logps/chosen"} <= logged
