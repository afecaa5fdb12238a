"""The plan: parameters counted, memory measured, steps as published, and refusals."""

import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from rlhf_guide import plan
from rlhf_guide.adapters import lora_config
from rlhf_guide.cli import main
from rlhf_guide.errors import GuideError, ParameterError
from rlhf_guide.models import last_layers
from rlhf_guide.profiles import load_profile

# The published configuration of Meta-Llama-3-8B.
LLAMA3 = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128_256,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    tie_word_embeddings=False,
    bos_token_id=128_000,
    eos_token_id=128_001,
)
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 2000,
    "tie_word_embeddings": False,
}
WIDE_VOCABULARY = {**SMALL, "hidden_size": 128, "vocab_size": 8000, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def paper():
    return {stage.name: stage for stage in plan.plan(load_profile("paper"))}


@pytest.mark.parametrize("rank", [0, 16])
def test_parameters_are_those_of_the_real_configuration(rank):
    """Llama-3-8B without its weights: on the meta device a model has shapes only."""
    sizes = plan.Architecture.of(LLAMA3)
    assert sizes == plan.LLAMA3_8B
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LLAMA3)
        if rank:
            from peft import get_peft_model

            model = get_peft_model(model, lora_config(rank))
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert trained == (sizes.adapter_parameters(rank) if rank else sizes.parameters)


@pytest.mark.parametrize(
    ("sizes", "tokens", "rank", "layers"),
    [(SMALL, 512, 0, 0), (WIDE_VOCABULARY, 256, 0, 0), (SMALL, 512, 8, 0), (SMALL, 512, 8, 1)],
)
def test_memory_is_within_15_percent_of_the_measured_peak(sizes, tokens, rank, layers):
    config = LlamaConfig(**sizes)
    estimate = plan.training_memory(
        plan.Architecture.of(config),
        tokens,
        lora_rank=rank,
        lora_layers=layers,
        mixed=False,
        checkpointing=False,
    )
    measured = _measured_peak(config, tokens, rank, layers)
    assert sum(estimate.values()) == pytest.approx(measured, rel=0.15)


def _measured_peak(config, tokens, rank, layers):
    """The most bytes of tensors alive in two training steps, from the profiler's memory events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        if rank:
            from peft import get_peft_model

            adapted = last_layers(model, layers)
            model = get_peft_model(model, lora_config(rank, layers_to_transform=adapted))
        optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad])
        for _ in range(2):
            ids = torch.randint(0, config.vocab_size, (1, tokens))
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    changes = torch.tensor([event.nbytes() for event in events])
    return int(changes.cumsum(0).max())


def test_each_strategy_divides_what_its_name_says():
    def parts(strategy):
        options = {"strategy": strategy, "mixed": False}
        found = plan.training_memory(plan.LLAMA3_8B, 1024, devices=8, **options)
        one = plan.training_memory(plan.LLAMA3_8B, 1024, mixed=False)
        names = ("weights", "gradients", "optimizer")
        return [one[name] / found[name] for name in names]

    assert parts("ddp") == [1, 1, 1]
    assert parts("zero2") == [1, 8, 8]
    assert parts("zero3") == parts("fsdp2") == [8, 8, 8]
    assert sum(plan.training_memory(plan.LLAMA3_8B, 0).values()) > 16 * plan.LLAMA3_8B.parameters


def test_deepspeed_keeps_bfloat16_weights_and_divides_the_float32_ones():
    def bytes_a_parameter(strategy):
        found = plan.training_memory(plan.LLAMA3_8B, 1024, devices=8, strategy=strategy)
        names = ("weights", "gradients", "optimizer")
        return [found[name] / plan.LLAMA3_8B.parameters for name in names]

    assert bytes_a_parameter("zero2") == [2, 2 / 8, 12 / 8]
    assert bytes_a_parameter("zero3") == [2 / 8, 2 / 8, 12 / 8]
    assert bytes_a_parameter("fsdp2") == [4 / 8, 4 / 8, 8 / 8]
    assert not plan.training_memory(plan.LLAMA3_8B, 1, devices=8, strategy="zero2")["weight copies"]


def test_adapters_cost_what_their_layers_cost():
    """Full training 2 + 4 for each weight; adapters 2 + 2; on half the layers less backward."""
    model = plan.LLAMA3_8B
    whole, adapters, half = (model.training_flops(*given) for given in ((), (16,), (16, 16)))
    assert adapters == pytest.approx(whole * 4 / 6)
    assert half == adapters - 2 * 16 * model.layer_parameters
    assert model.adapter_parameters(16, 8) == model.adapter_parameters(16) / 4


def test_steps_are_those_on_record(paper):
    """1,367 = 700,000 / 512; the released pair model is checkpoint 1,308; DPO 2 x 156."""
    assert paper["reward_model"].steps == 1367
    assert paper["preference_model"].steps == pytest.approx(1308, rel=0.1)
    assert [paper[f"iteration {t}: dpo"].steps for t in (1, 2, 3)] == [2 * (20_000 // 128)] * 3


def test_more_devices_take_less_time_at_the_same_price(paper):
    half = {stage.name: stage for stage in plan.plan(load_profile("paper"), gpus=4)}
    for name, stage in paper.items():
        assert half[name].hours == pytest.approx(2 * stage.hours, rel=0.01)
        assert half[name].dollars == pytest.approx(stage.dollars, rel=0.01)
        assert half[name].tokens == stage.tokens


def test_what_does_not_fit_is_said_and_refused():
    stages = plan.plan(load_profile("paper"), gpus=1)
    warned = [stage.name for stage in stages if stage.warning]
    assert {"sft", "reward_model", "iteration 1: dpo"} <= set(warned)
    assert "iteration 1: annotation" not in warned
    with pytest.raises(GuideError, match="sft does not fit"):
        plan.require_fit(stages)
    assert plan.plan(load_profile("gpu"), gpus=1)


def test_impossible_plans_are_refused():
    paper = load_profile("paper")
    with pytest.raises(ParameterError, match="global batch of 32 cannot"):
        plan.plan(paper, gpus=5)
    with pytest.raises(ParameterError, match="h100-80gb"):
        plan.plan(paper, gpu="h100")
    with pytest.raises(ParameterError, match="fsdp2"):
        plan.plan(paper, strategy="fsdp")
    with pytest.raises(ParameterError, match="folder"):
        plan.architecture("meta-llama/Meta-Llama-3-70B")


@pytest.mark.parametrize("name", ["smoke", "cpu", "gpu"])
def test_every_profile_has_a_plan(name):
    stages = plan.plan(load_profile(name), gpus=1)
    assert len(stages) == 4 + 3 * load_profile(name).online.iterations
    assert all(stage.hours > 0 and stage.steps > 0 for stage in stages)


def test_known_sizes_are_those_of_the_folder():
    from rlhf_guide.models import resolve_model

    config = AutoConfig.from_pretrained(resolve_model("random-tiny-llama"))
    assert plan.architecture("random-tiny-llama") == plan.Architecture.of(config)


def test_command_prints_table_assumptions_and_json(capsys):
    assert main(["plan", "--gpus", "1"]) == 0
    text = capsys.readouterr().out
    assert "warning: sft does not fit" in text
    assert all(name in text for name in plan.ASSUMPTIONS)
    assert main(["plan", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["name"] == "sft"
    assert set(rows[0]["memory"]) >= {"weights", "gradients", "optimizer", "activations"}
