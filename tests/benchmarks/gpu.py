"""What one GPU does: training with each speed-up in turn, DPO, scoring, sampling, the whole chain.

    python tests/benchmarks/gpu.py                       # one GPU, about half an hour
    python tests/benchmarks/gpu.py --device cpu --tiny   # the same lines at a toy's size
    python tests/benchmarks/gpu.py --json                # for record.py

Two Llama architectures with random weights (speed does not depend on the weights) and SmolLM2-135M
with its own. A step is forward, backward and AdamW on float32 weights, in bfloat16 autocast. A
token is useful when it is no padding. Model-FLOP utilisation counts useful tokens only:

    (6 · (parameters − input embedding) + 6 · layers · hidden · span) · tokens a second / peak

with `span` the length of the conversation that a token stands in (attention is causal: a token sees
half of it), averaged over tokens. `peak` is the maker's number for dense bfloat16 products, or
without one what `throughput.matmul_rate` reaches.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from trl.trainer.utils import add_fused_lm_head

from data_prep.embedded import load_prompts
from rlhf_guide import plan, throughput
from rlhf_guide.batching import last_hidden_states
from rlhf_guide.dpo import dpo_loss
from rlhf_guide.generation import generate
from rlhf_guide.models import load_tokenizer, resolve_model, save_model
from rlhf_guide.notebook import quieten
from rlhf_guide.packing import long_tailed_lengths
from rlhf_guide.profiles import load_profile

# Sizes beside SmolLM2's vocabulary: 0.47 and 1.46 billion parameters.
RANDOM_MODELS = {
    "llama-0.5b": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24},
    "llama-1.5b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 28},
}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": False}
# Dense bfloat16 products a second, from the makers' data sheets (SXM).
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
# On a CPU flex attention has no backward pass, and compiling takes longer than the toy's run.
NOT_ON_CPU = {"attention", "compiled"}


@dataclass(frozen=True)
class Size:
    """How much one measurement reads: blocks a step, tokens a block, steps, prompts."""

    rows: int = 4
    block: int = 4096
    steps: int = 10
    prompts: int = 128
    new_tokens: int = 256


TINY = Size(rows=2, block=64, steps=2, prompts=2, new_tokens=4)

# Each line keeps what the lines above it gained.
LADDER = {
    "padded": {},
    "packed": {"packed": True},
    "+ variable-length attention": {"packed": True, "attention": "flex_attention"},
    "+ chunked loss": {"packed": True, "attention": "flex_attention", "chunked": True},
    "+ compile": {
        "packed": True,
        "attention": "flex_attention",
        "chunked": True,
        "compiled": True,
    },
}


def main() -> None:
    """Measure, print one line each, and with --json one JSON object at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a random model of 64 dimensions")
    parser.add_argument("--no-chain", action="store_true", help="leave the whole chain out")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device here: run this on a machine with a GPU, or add --device cpu.")
    quieten()
    torch.manual_seed(0)
    size = TINY if options.tiny else Size()
    names = ["random-tiny-llama"] if options.tiny else [*RANDOM_MODELS, "smollm2-135m-instruct"]
    peak = peak_rate(options.device)
    result = {"peak_tflops": peak / 1e12}
    for name in names:
        result[name] = {}
        for label, row in measure(name, options.device, size, peak):
            result[name][label] = row
            print(f"{name:24} {label:32} {row}", flush=True)
    if not options.no_chain:
        result["chain_seconds"] = chain("smoke" if options.tiny else "cpu")
    if options.json:
        print(json.dumps(result))


def peak_rate(device: str) -> float:
    """Products a second that utilisation is measured against."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    known = [rate for part, rate in PEAKS.items() if part in name]
    return known[0] if known else throughput.matmul_rate(torch.float32, size=256, seconds=0.2)


def measure(name: str, device: str, size: Size, peak: float) -> Iterator[tuple[str, dict]]:
    """Every measurement of one model, with its label."""
    for label, options in LADDER.items():
        given = dict(options)
        if device == "cpu":
            given = {key: value for key, value in options.items() if key not in NOT_ON_CPU}
        yield (
            f"SFT {label}",
            {
                **sft_speed(name, device, size, peak, **given),
                "left_out": sorted(options.keys() - given.keys()),
            },
        )
    for live in (True, False):
        label = "live" if live else "cached"
        yield f"DPO, {label} reference", dpo_speed(name, device, size, live)
    yield "scoring", scoring_speed(name, device, size)
    yield "sampling (transformers)", sampling_speed(name, device, size)


def make_model(name: str, device: str, attention: str = "sdpa", kind: type = AutoModelForCausalLM):
    """A model in float32, with random weights where the architecture is this benchmark's own."""
    options = {"attn_implementation": attention, "dtype": torch.float32}
    if kind is AutoModelForSequenceClassification:
        options["num_labels"] = 1
    if name not in RANDOM_MODELS:
        return kind.from_pretrained(resolve_model(name), **options).to(device)
    sizes = {**RANDOM_MODELS[name], **HEADS}
    config = AutoConfig.from_pretrained(resolve_model("random-tiny-llama"), **sizes)
    with torch.device(device):
        return kind.from_config(config, **options)


def sft_speed(
    name: str,
    device: str,
    size: Size,
    peak: float,
    packed: bool = False,
    attention: str = "sdpa",
    chunked: bool = False,
    compiled: bool = False,
) -> dict[str, float]:
    """Useful tokens a second, utilisation and peak memory of fine-tuning all weights."""
    model = make_model(name, device, attention).train()
    if chunked:
        add_fused_lm_head(model)
    run = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device == "cuda")
    batch, lengths = (packed_batch if packed else padded_batch)(size, device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = sft_loss(run, batch, chunked)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    rate = float(lengths.sum() * speed(step, device, size.steps))
    span = float((lengths**2).sum() / lengths.sum())
    return {
        "tokens_per_second": round(rate, 1),
        "utilisation": round(rate * flops_per_token(model, span) / peak, 4),
        **memory(device),
        "planned_gib": None if chunked else round(planned_gib(model, batch), 2),
    }


def planned_gib(model, batch: dict[str, torch.Tensor]) -> float:
    """What `rlhf-guide plan` expects of this step, to hold against the measured peak."""
    sizes = plan.Architecture.of(model.config)
    parts = plan.training_memory(sizes, batch["input_ids"].numel(), checkpointing=False)
    return sum(parts.values()) / 2**30


def sft_loss(model, batch: dict[str, torch.Tensor], chunked: bool) -> torch.Tensor:
    """Mean negative log-likelihood of the learnt tokens."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if chunked:
        return model(**inputs, labels=batch["labels"], fused_lm_head=True).loss
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


def packed_batch(size: Size, device: str) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Full blocks of conversations: positions restart with each, which keeps them apart."""
    lengths: list[int] = []
    for row in range(size.rows):
        ends = long_tailed_lengths(size.block, size.block, seed=row).cumsum()
        lengths += np.diff(np.unique([0, *ends.clip(max=size.block)])).tolist()
    positions = torch.cat([torch.arange(length) for length in lengths])
    ids = torch.randint(10, 40_000, (size.rows, size.block))
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions.view(size.rows, -1)}
    return on(device, batch), np.array(lengths)


def padded_batch(size: Size, device: str) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Conversations padded to the longest, in as much room as the packed blocks have."""
    lengths = long_tailed_lengths(size.rows * size.block, size.block)
    rows = 1
    while (rows + 1) * lengths[: rows + 1].max() <= size.rows * size.block:
        rows += 1
    lengths = lengths[:rows]
    mask = torch.arange(int(lengths.max())) < torch.tensor(lengths)[:, None]
    ids = torch.randint(10, 40_000, mask.shape)
    labels = ids.masked_fill(~mask, -100)
    return on(device, {"input_ids": ids, "labels": labels, "attention_mask": mask.long()}), lengths


def dpo_speed(name: str, device: str, size: Size, live: bool) -> dict[str, float]:
    """Pairs a second of DPO on all weights; a live reference runs beside the policy."""
    policy = make_model(name, device).train()
    reference = make_model(name, device).eval() if live else None
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=device == "cuda")
    width = min(size.block, 1024)
    ids = on(device, {"ids": torch.randint(10, 40_000, (2 * size.rows, width))})["ids"]

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            with torch.no_grad():
                given = logps(reference, ids) if live else torch.zeros(len(ids), device=device)
            loss = dpo_loss(*logps(policy, ids).chunk(2), *given.chunk(2), beta=0.1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    rate = size.rows * speed(step, device, size.steps)
    return {"pairs_per_second": round(rate, 3), **memory(device)}


def logps(model, ids: torch.Tensor) -> torch.Tensor:
    """Summed log-probability of each row's second half, shape (rows,)."""
    half = ids.shape[1] // 2
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=half + 1).logits[:, :-1].float()
    return -F.cross_entropy(logits.transpose(1, 2), ids[:, -half:], reduction="none").sum(dim=1)


def scoring_speed(name: str, device: str, size: Size) -> dict[str, float]:
    """Answers a second through the reward model's backbone, in bfloat16."""
    model = make_model(name, device, kind=AutoModelForSequenceClassification)
    model = model.to(torch.bfloat16).eval()
    lengths = long_tailed_lengths(size.prompts, min(size.block, 1024))
    sequences = [[10] * int(length) for length in lengths]
    rate = speed(lambda: last_hidden_states(model, sequences, 0), device, 2)
    return {
        "answers_per_second": round(rate * len(sequences), 2),
        "tokens_per_second": round(rate * float(lengths.sum()), 1),
        **memory(device),
    }


def sampling_speed(name: str, device: str, size: Size) -> dict[str, float]:
    """Tokens a second of the transformers backend, each prompt answered twice."""
    settings = replace(load_profile("cpu").generation, max_new_tokens=size.new_tokens)
    tokenizer = load_tokenizer(resolve_model("random-tiny-llama"))
    prompts = load_prompts("evaluation")[: size.prompts]
    with tempfile.TemporaryDirectory() as folder:
        save_model(make_model(name, "cpu"), tokenizer, folder)
        started = time.perf_counter()
        out = Path(folder) / "answers.jsonl"
        rows = generate(folder, prompts, settings, [1.0, 0.7], 0, out, progress=False)
        seconds = time.perf_counter() - started
    tokens = sum(answer["n_tokens"] for row in rows for answer in row["responses"])
    return {"tokens_per_second": round(tokens / seconds, 1), **memory(device)}


def chain(profile: str) -> float:
    """Seconds of the whole course on the embedded miniature, all notebooks."""
    command = [sys.executable, "-m", "rlhf_guide.cli", "run", "--profile", profile, "--no-network"]
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        subprocess.run([*command, "--run-dir", folder], check=True, stdout=sys.stderr)
        return round(time.perf_counter() - started, 1)


def speed(step: Callable[[], object], device: str, steps: int) -> float:
    """Steps a second, after two that compile and allocate; memory is counted from here on."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        step()
    started = now(device)
    for _ in range(steps):
        step()
    return steps / (now(device) - started)


def now(device: str) -> float:
    """The clock, after the GPU has done what was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def flops_per_token(model, span: float) -> float:
    """Operations of one training token; see the head of this file."""
    config = model.config
    embedding = model.get_input_embeddings().weight
    tied = embedding is model.get_output_embeddings().weight
    weights = sum(weight.numel() for weight in model.parameters())
    weights -= 0 if tied else embedding.numel()
    return 6 * weights + 6 * config.num_hidden_layers * config.hidden_size * span


def memory(device: str) -> dict[str, float]:
    """The largest amount of GPU memory since `speed` began; nothing on a CPU."""
    if device == "cpu":
        return {}
    return {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}


def on(device: str, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on the device."""
    return {key: value.to(device) for key, value in batch.items()}


if __name__ == "__main__":
    main()
