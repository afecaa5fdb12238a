"""What the loop's two expensive steps gain: sampling in batches, and a reference computed once.

    python tests/benchmarks/online.py                  # SmolLM2-135M, minutes
    python tests/benchmarks/online.py --json

`generation_ratio`: tokens a second of `generation.generate` against transformers' own `generate`
with one prompt a call (all its answers of one temperature at once), on the same prompts.
`vllm_over_transformers`: vLLM's tokens a second against those of `generation.generate`, without the
time that vLLM needs to start; null where vLLM is not installed. `cached_reference_ratio`: time of a
DPO step, forward and backward, with a live reference against one whose log-probabilities are
columns of the data. The pass that computes them once is not in it: with a single epoch it costs
about what it saves. `attention_ratio`: such a step with PyTorch's fused attention against one with
attention by products (see `shared_prompts`); 1 but for noise where the two are the same. Rounds of
what is compared alternate, so that a busy machine slows all alike.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import GenerationConfig

from data_prep import embedded
from rlhf_guide import oracle, shared_prompts
from rlhf_guide.chat import encode_prompt, stop_token_ids
from rlhf_guide.embedded import NAMES
from rlhf_guide.generation import generate
from rlhf_guide.machine import keep_freed_memory
from rlhf_guide.models import choose_device, load_policy, load_tokenizer, resolve_model
from rlhf_guide.notebook import quieten
from rlhf_guide.online_stages import mixed_temperatures
from rlhf_guide.profiles import Profile, load_profile

ROUNDS = 2
SEED = 0


def generation_rates(profile: Profile, base: Path, count: int) -> dict[str, float]:
    """Tokens a second of both ways to sample; each round has its own half of the prompts."""
    prompts = embedded.load_prompts("online_1")[:count]
    policy = load_policy(base, profile.dtype)
    tokenizer = load_tokenizer(base)
    ways: dict[str, Callable[[list[dict]], int]] = {
        "batches": lambda part: in_batches(profile, base, part),
        "one_prompt_at_a_time": lambda part: one_at_a_time(profile, policy, tokenizer, part),
    }
    tokens, seconds = Counter(), Counter()
    for start in range(ROUNDS):
        for name, way in ways.items():
            began = time.perf_counter()
            tokens[name] += way(prompts[start::ROUNDS])
            seconds[name] += time.perf_counter() - began
    return {name: tokens[name] / seconds[name] for name in ways}


def in_batches(profile: Profile, base: Path, prompts: list[dict]) -> int:
    """Sample as the course does, loading of the model included; return the number of new tokens."""
    temperatures = mixed_temperatures(profile.online)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.jsonl"
        settings, dtype = profile.generation, profile.dtype
        rows = generate(base, prompts, settings, temperatures, SEED, out, dtype, progress=False)
    answers = [answer for row in rows for answer in row["responses"]]
    return sum(answer["n_tokens"] + (answer["finish_reason"] == "stop") for answer in answers)


def one_at_a_time(profile: Profile, policy: Any, tokenizer: Any, prompts: list[dict]) -> int:
    """Sample with transformers alone, prompt after prompt; return the number of new tokens."""
    torch.manual_seed(SEED)
    tokens = 0
    for prompt in prompts:
        ids = torch.tensor([encode_prompt(tokenizer, prompt["messages"])], device=policy.device)
        for temperature, answers in Counter(mixed_temperatures(profile.online)).items():
            config = GenerationConfig(
                do_sample=True,
                temperature=temperature,
                top_k=0,
                max_new_tokens=profile.generation.max_new_tokens,
                num_return_sequences=answers,
                eos_token_id=stop_token_ids(tokenizer, policy),
                pad_token_id=tokenizer.pad_token_id,
            )
            found = policy.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=config
            )
            tokens += int((found[:, ids.shape[1] :] != tokenizer.pad_token_id).sum())
    return tokens


def vllm_rate(profile: Profile, base: Path, count: int) -> float | None:
    """Tokens a second of vLLM, its start left out by subtracting a call with a single prompt."""
    if importlib.util.find_spec("vllm") is None:
        print("vllm_over_transformers is null: vLLM is not installed here", file=sys.stderr)
        return None
    profile = replace(profile, generation=replace(profile.generation, backend="vllm"))
    prompts = embedded.load_prompts("online_1")[: count + 1]
    found = []
    for part in (prompts[:1], prompts[1:]):
        began = time.perf_counter()
        found.append((in_batches(profile, base, part), time.perf_counter() - began))
    (few, start), (many, whole) = found
    return (many - few) / (whole - start)


def reference_times(profile: Profile, base: Path, steps: int) -> dict[str, float]:
    """Mean seconds of a DPO step on equal batches: cached or live reference, fused attention."""
    from rlhf_guide.dpo import encode_pairs, make_trainer

    pairs, _ = embedded.build_pairs(
        "preference_train",
        lambda prompt, text, reason: oracle.utility(prompt, text, reason).total,
        oracle.annotator(),
    )
    settings, tokenizer = profile.dpo, load_tokenizer(base)
    rows, _ = encode_pairs(tokenizer, pairs[: steps * settings.batch_size], settings.max_length)
    seconds = Counter()
    with tempfile.TemporaryDirectory() as folder:
        dtype = choose_device(profile.dtype)[1]
        trainer = make_trainer(base, tokenizer, rows, settings, folder, SEED, dtype)
        trainer.model.train()
        batches = list(trainer.get_train_dataloader())
        for cached in (True, False):
            step_seconds(trainer, batches[0], cached)  # warm-up
        for batch in batches:
            seconds["cached"] += step_seconds(trainer, batch, cached=True)
            seconds["live"] += step_seconds(trainer, batch, cached=False)
            with mock.patch.object(shared_prompts, "attention_by_products", nullcontext):
                seconds["fused"] += step_seconds(trainer, batch, cached=True)
    return {name: total / len(batches) for name, total in seconds.items()}


def step_seconds(trainer: Any, batch: dict[str, Any], cached: bool) -> float:
    """Seconds of forward and backward pass, reading or computing the reference's numbers."""
    trainer.precompute_ref_logps = cached
    began = time.perf_counter()
    trainer.compute_loss(trainer.model, dict(batch)).backward()
    return time.perf_counter() - began


def measure(model: str, prompts: int, steps: int) -> dict[str, float | None]:
    """All three comparisons, and the rates behind them."""
    profile, base = load_profile("cpu"), resolve_model(model)
    rates = generation_rates(profile, base, prompts)
    vllm = vllm_rate(profile, base, prompts)
    times = reference_times(profile, base, steps)
    return {
        "generation_ratio": rates["batches"] / rates["one_prompt_at_a_time"],
        "vllm_over_transformers": None if vllm is None else vllm / rates["batches"],
        "cached_reference_ratio": times["live"] / times["cached"],
        "attention_ratio": times["fused"] / times["cached"],
        "tokens_per_second": rates["batches"],
        "tokens_per_second_one_prompt_at_a_time": rates["one_prompt_at_a_time"],
        "seconds_per_step_cached": times["cached"],
        "seconds_per_step_live": times["live"],
    }


def main() -> None:
    """Measure, and print a table or, with `--json`, one object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=NAMES[0], help="an embedded model or a folder")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    quieten()
    keep_freed_memory()  # as every notebook does
    found = measure(given.model, given.prompts, given.steps)
    if given.json:
        print(json.dumps(found))
    else:
        shown = {name: "null" if value is None else f"{value:.3f}" for name, value in found.items()}
        print("\n".join(f"{name:40} {value:>10}" for name, value in shown.items()))


if __name__ == "__main__":
    main()
