"""What a run will cost before it starts: steps, tokens, memory, hours and money of each stage.

    rlhf-guide plan --profile paper --gpus 8 --gpu h100-80gb

Memory follows from the architecture: weights, gradients and optimizer state by counting,
activations by adding up what a training step keeps for its backward pass (`tests/test_plan.py`
measures it).
Time follows from operations and bytes, divided by what a GPU can do and the share of it that is
assumed here. The shares are assumptions, each with its reason in `ASSUMPTIONS`; so are the prices.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .errors import GuideError, ParameterError
from .parameters import nearest
from .settings import Profile

GB = 10**9


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The sizes of a Llama-like model that memory and time depend on."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool

    @property
    def kv_width(self) -> int:
        """Width of a layer's keys, and of its values."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer: four attention and three MLP matrices, two norms."""
        attention = 2 * self.hidden * (self.hidden + self.kv_width)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the input embedding, and of the output head when it has its own."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters."""
        tables = self.embedding_parameters * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + tables + self.hidden

    @property
    def multiplied(self) -> int:
        """Parameters that every token is multiplied with: all but the input embedding's look-up."""
        return self.layers * self.layer_parameters + self.embedding_parameters

    def adapter_parameters(self, rank: int, layers: int = 0) -> int:
        """Parameters of adapters on all seven projections of the last `layers` (0: all) layers."""
        attention = 2 * (2 * self.hidden) + 2 * (self.hidden + self.kv_width)
        per_layer = rank * (attention + 3 * (self.hidden + self.intermediate))
        return self.adapted(layers) * per_layer

    def adapted(self, layers: int) -> int:
        """How many layers `lora_layers` means: 0 stands for all."""
        return min(layers or self.layers, self.layers)

    def training_flops(self, lora_rank: int = 0, lora_layers: int = 0) -> float:
        """Operations of one training step for each token.

        Forward 2 for each weight. Backward 2 for the gradient of the input, which ends at the first
        trained layer, and 2 more for that of the weight where the weight itself is trained.
        """
        if not lora_rank:
            return 6 * self.multiplied
        above = self.adapted(lora_layers) * self.layer_parameters + self.embedding_parameters
        return 2 * self.multiplied + 2 * above

    @classmethod
    def of(cls, config: Any) -> "Architecture":
        """The sizes in a transformers configuration."""
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            vocabulary=config.vocab_size,
            tied=config.tie_word_embeddings,
        )


# From the models' published configurations; another model's is read from its folder.
LLAMA3_8B = Architecture(
    layers=32,
    hidden=4096,
    intermediate=14_336,
    heads=32,
    kv_heads=8,
    vocabulary=128_256,
    tied=False,
)
SMOLLM2_1_7B = Architecture(
    layers=24,
    hidden=2048,
    intermediate=8192,
    heads=32,
    kv_heads=32,
    vocabulary=49_152,
    tied=True,
)
SMOLLM2_135M = Architecture(
    layers=30, hidden=576, intermediate=1536, heads=9, kv_heads=3, vocabulary=49_152, tied=True
)
ARCHITECTURES = {
    "meta-llama/Meta-Llama-3-8B": LLAMA3_8B,
    "meta-llama/Meta-Llama-3-8B-Instruct": LLAMA3_8B,
    "HuggingFaceTB/SmolLM2-1.7B": SMOLLM2_1_7B,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": SMOLLM2_1_7B,
    "smollm2-135m-instruct": SMOLLM2_135M,
}


@dataclass(frozen=True, kw_only=True)
class GPU:
    """One device: bytes of memory, bfloat16 operations and bytes a second, dollars an hour."""

    memory: float
    flops: float
    bandwidth: float
    price: float


# Memory, operations and bandwidth are the maker's numbers (SXM boards, dense bfloat16). Prices are
# round on-demand prices of smaller cloud providers: an order of size, to be replaced by your own.
GPUS = {
    "a100-80gb": GPU(memory=80 * GB, flops=312e12, bandwidth=2.04e12, price=2.0),
    "h100-80gb": GPU(memory=80 * GB, flops=989e12, bandwidth=3.35e12, price=3.0),
    "h200-141gb": GPU(memory=141 * GB, flops=989e12, bandwidth=4.8e12, price=4.0),
}

# Every number that is assumed and neither counted nor published: value and reason.
ASSUMPTIONS: dict[str, tuple[float, str]] = {
    "training_utilisation": (0.40, "share of the peak in training; tuned runs report 0.4 to 0.55"),
    "scoring_utilisation": (0.40, "a forward pass over long batches multiplies like training"),
    "bandwidth_utilisation": (0.50, "decoding waits for memory; kernels reach half of its rate"),
    "usable_memory": (0.92, "the rest is CUDA's context, buffers of NCCL, fragmentation"),
    "vllm_memory": (0.90, "vLLM's default share of the memory for weights and cache"),
    "answers_in_flight": (256, "sequences that vLLM decodes at once, its usual maximum"),
    "demonstrations": (1_760_000, "rows of a public union of the nine SFT sources"),
    "demonstration_tokens": (450, "mean length of a demonstration; nobody published it"),
    "offline_pairs": (183_000, "prompts of Nectar, the offline baseline's source, one pair each"),
    "answer_tokens": (500, "an online answer, longer than the stored ones below"),
    "miniature_rows": (500, "rows of each kind in the embedded data, which run in minutes anyhow"),
    "comparison_tokens": (20, "what the pair model's template adds to prompt and answers"),
}

# The paper's Table 5: pairs, and mean tokens of prompt, chosen and rejected answer.
PREFERENCES = (
    (115_396, 160.4, 82.2, 73.6),
    (93_301, 186.2, 173.6, 88.8),
    (37_131, 530, 116.4, 89.3),
    (26_874, 21.5, 70.4, 74.6),
    (340_025, 161.5, 279.5, 211.1),
    (161_927, 507.4, 396.6, 416.7),
    (50_156, 172.8, 427.6, 400.6),
    (2_418, 36.5, 276.5, 265.3),
    (6_926, 153.3, 165.4, 260.5),
    (14_811, 634.5, 348.4, 401.9),
)
# The released training set has 700,000 of the 848,965 pairs, which gives the paper's step counts.
RELEASED_PAIRS = 700_000

STRATEGIES = ("ddp", "zero2", "zero3", "fsdp2")


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage's cost. `memory` is bytes a device by component; `tokens` counts all devices'."""

    name: str
    steps: int
    tokens: float
    hours: float
    dollars: float
    memory: dict[str, float]
    room: float

    @property
    def total(self) -> float:
        """Bytes that a device has to hold."""
        return sum(self.memory.values())

    @property
    def warning(self) -> str:
        """Why it does not fit, or nothing."""
        if self.total <= self.room:
            return ""
        largest = max(self.memory, key=self.memory.get)
        return (
            f"{self.name} does not fit: {self.total / GB:.0f} GB a device, {self.room / GB:.0f} GB "
            f"usable, {largest} the most ({self.memory[largest] / GB:.0f} GB): {ADVICE[largest]}."
        )


SHARD = "shard with fsdp2 or zero3 over more devices, or train adapters (lora_rank)"
ADVICE = {
    "weights": SHARD,
    "weight copies": SHARD,
    "gradients": SHARD,
    "optimizer": SHARD,
    "activations": "lower per_device_batch_size or max_length",
    "logits": "lower per_device_batch_size or max_length",
    "KV cache": "decode fewer answers at once",
}


def assumed(name: str) -> float:
    """The value of an assumption."""
    return ASSUMPTIONS[name][0]


def architecture(name: str) -> Architecture:
    """Sizes of a known model by its id, or read from the configuration in its folder.

    Raises ParameterError for a Hub id that is not known here.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    from pathlib import Path

    from . import embedded

    if name not in embedded.NAMES and not Path(name).is_dir():
        raise ParameterError(
            f"the sizes of model {name!r} are not known: give the folder it lies in."
            + nearest(name, ARCHITECTURES)
        )
    from transformers import AutoConfig

    from .models import resolve_model

    return Architecture.of(AutoConfig.from_pretrained(resolve_model(name)))


def training_memory(
    model: Architecture,
    tokens: int,
    *,
    lora_rank: int = 0,
    lora_layers: int = 0,
    devices: int = 1,
    strategy: str = "ddp",
    mixed: bool = True,
    checkpointing: bool = True,
    head: bool = True,
    output_tokens: int | None = None,
) -> dict[str, float]:
    """Peak bytes a device by component, for one micro-batch of `tokens` with AdamW.

    Full fine-tuning holds weights, gradients and both moments in float32 (16 bytes a parameter);
    `mixed` adds bfloat16 copies for autocast. With adapters the frozen weights have 2 bytes, or 4
    unless `mixed`. `strategy` divides: ddp nothing, zero2 gradients and optimizer, zero3 and fsdp2
    weights too, of which two gathered layers are whole at a time. DeepSpeed (zero2, zero3) has no
    autocast: `mixed` makes its weights and gradients bfloat16, 2 bytes each, and its optimizer
    keeps the float32 weights beside the moments, 12 bytes. With adapters in the last
    `lora_layers` only (0: all), the layers below keep no activations. `head`: the output has a
    score for every word of the vocabulary, at `output_tokens` places (all by default).
    """
    if strategy not in STRATEGIES:
        raise ParameterError(
            f"strategy is {strategy!r}; choose one of {', '.join(STRATEGIES)}."
            + nearest(strategy, STRATEGIES)
        )
    trained = model.adapter_parameters(lora_rank, lora_layers) if lora_rank else model.parameters
    kept = model.adapted(lora_layers) if lora_rank else model.layers
    frozen = model.parameters if lora_rank else 0
    low = 2 if mixed else 4
    parts = devices if strategy in ("zero3", "fsdp2") else 1
    small = 1 if strategy == "ddp" else devices
    whole = max(model.layer_parameters, model.embedding_parameters) * 2
    cast = mixed and strategy.startswith("zero")
    if parts > 1:
        copies = low * whole
    else:
        copies = low * model.multiplied if mixed and not lora_rank and not cast else 0
    outputs = tokens if output_tokens is None else output_tokens
    return {
        "weights": ((2 if cast else 4) * trained + low * frozen) / parts,
        "weight copies": copies,
        "gradients": (2 if cast else 4) * trained / small,
        "optimizer": (12 if cast else 8) * trained / small,
        "activations": activation_bytes(model, tokens, low, checkpointing, bool(lora_rank), kept),
        "logits": LOGIT_COPIES * 4 * outputs * model.vocabulary if head else 0,
    }


# float32 tensors of the logits' size at the peak: logits, their log-softmax, and its gradient.
LOGIT_COPIES = 3


def activation_bytes(
    model: Architecture,
    tokens: int,
    width: int,
    checkpointing: bool,
    adapters: bool,
    layers: int,
) -> float:
    """Bytes that `layers` layers keep between forward and backward pass, `width` bytes a number.

    A layer keeps for each token: around both norms input, normalised input and output (6 hidden);
    queries, keys and values (repeated to the queries' width) and attention's output; and four
    times the MLP's width (gate, its SiLU, up, their product). Frozen norms do not need the
    normalised input. With checkpointing one layer keeps all this at a time, the others their input.
    """
    norm = 2 if adapters else 3
    inside = (2 * norm + 4) * model.hidden + 4 * model.intermediate
    final = norm * model.hidden
    if checkpointing:
        return width * tokens * (layers * model.hidden + inside + final)
    return width * tokens * (layers * inside + final)


def generation_memory(model: Architecture, gpu: GPU, tokens: int) -> dict[str, float]:
    """Bytes a device of decoding: bfloat16 weights, and the cache of the answers in flight."""
    room = assumed("vllm_memory") * gpu.memory
    weights = 2 * model.parameters
    wanted = assumed("answers_in_flight") * tokens * kv_bytes(model)
    return {
        "weights": weights,
        "KV cache": min(wanted, max(room - weights, tokens * kv_bytes(model))),
    }


def kv_bytes(model: Architecture) -> int:
    """Bytes of one token's keys and values in all layers, in bfloat16."""
    return 2 * 2 * model.layers * model.kv_width


def mean_pair() -> tuple[float, float]:
    """Mean tokens of a prompt and of an answer, over the pairs of Table 5."""
    pairs = sum(row[0] for row in PREFERENCES)
    prompt = sum(n * tokens for n, tokens, _, _ in PREFERENCES) / pairs
    answer = sum(n * (chosen + rejected) / 2 for n, _, chosen, rejected in PREFERENCES) / pairs
    return prompt, answer


def plan(
    profile: Profile, gpus: int = 8, gpu: str = "h100-80gb", strategy: str | None = None
) -> list[StagePlan]:
    """Every stage of a profile on `gpus` devices, in order.

    Without a strategy it is ddp on one device and for adapters, fsdp2 otherwise. Raises
    ParameterError for an unknown GPU and for a global batch that the devices cannot make.
    """
    if gpu not in GPUS:
        raise ParameterError(
            f"unknown GPU {gpu!r}; there are {', '.join(GPUS)}." + nearest(gpu, GPUS)
        )
    if gpus < 1:
        raise ParameterError(f"gpus is {gpus}; a plan needs at least one.")
    return list(_stages(profile, gpus, GPUS[gpu], strategy))


def require_fit(stages: list[StagePlan]) -> None:
    """Raise GuideError naming every stage that does not fit, before anything is loaded."""
    if warnings := [stage.warning for stage in stages if stage.warning]:
        raise GuideError("\n".join(warnings))


def rows(profile: Profile) -> dict[str, float]:
    """How many rows each stage reads: the profile's limit, else those of its data."""
    if profile.data_source == "embedded":
        whole = dict.fromkeys(("sft", "pairs", "offline"), assumed("miniature_rows"))
    else:
        whole = {
            "sft": assumed("demonstrations"),
            "pairs": RELEASED_PAIRS,
            "offline": assumed("offline_pairs"),
        }
    limits = {
        "sft": (profile.sft.max_samples, whole["sft"]),
        "reward_model": (profile.reward_model.max_samples, whole["pairs"]),
        "preference_model": (profile.preference_model.max_samples, whole["pairs"]),
        "offline_dpo": (profile.dpo.max_samples, whole["offline"]),
    }
    return {name: min(limit or there, there) for name, (limit, there) in limits.items()}


def _stages(profile: Profile, gpus: int, gpu: GPU, strategy: str | None) -> Iterator[StagePlan]:
    policy, judge = architecture(profile.base_model), architecture(profile.reward_base_model)
    prompt, stored = mean_pair()
    count, online = rows(profile), profile.online
    answer = min(assumed("answer_tokens"), profile.generation.max_new_tokens)

    def train(name: str, model: Architecture, section: Any, **cost: Any) -> StagePlan:
        return _training(name, model, section, gpus, gpu, strategy, **cost)

    yield train("sft", policy, profile.sft, tokens=count["sft"] * assumed("demonstration_tokens"))
    pair = 2 * (prompt + stored)
    n = count["reward_model"]
    yield train("reward_model", judge, profile.reward_model, rows=n, tokens=n * pair, pairs=True)
    n = count["preference_model"]
    compared = prompt + 2 * stored + assumed("comparison_tokens")
    yield train("preference_model", judge, profile.preference_model, tokens=n * compared)
    n = count["offline_dpo"] * profile.dpo.offline_epochs / profile.dpo.epochs
    yield train("offline_dpo", policy, profile.dpo, rows=n, tokens=n * pair, pairs=True)
    prompts, answers = online.prompts_per_iteration, online.samples_per_prompt
    pair = 2 * (prompt + answer)
    for t in range(1, online.iterations + 1):
        name = f"iteration {t}: "
        yield _generation(f"{name}generation", policy, prompts * answers, prompt, answer, gpus, gpu)
        yield _scoring(
            f"{name}annotation", judge, prompts * answers * (prompt + answer), gpus, gpu, profile
        )
        yield train(
            f"{name}dpo", policy, profile.dpo, rows=prompts, tokens=prompts * pair, pairs=True
        )


def _training(
    name: str,
    model: Architecture,
    section: Any,
    gpus: int,
    gpu: GPU,
    strategy: str | None,
    tokens: float,
    rows: float | None = None,
    pairs: bool = False,
) -> StagePlan:
    """A trainer's stage; without `rows` its data are packed into blocks of max_length."""
    from .training import accumulation_steps

    accumulation_steps(section.batch_size, section.per_device_batch_size, gpus)  # or refuse
    units = rows if rows is not None else tokens / section.max_length
    preference = hasattr(section, "beta")
    layers = getattr(section, "lora_layers", 0)
    each = model.training_flops(section.lora_rank, layers)
    each += 2 * model.multiplied * preference  # the reference reads the pairs as well
    flops = each * tokens * section.epochs
    memory = training_memory(
        model,
        section.per_device_batch_size * section.max_length * (2 if pairs else 1),
        lora_rank=section.lora_rank,
        lora_layers=layers,
        devices=gpus,
        strategy=strategy or ("ddp" if section.lora_rank or gpus == 1 else "fsdp2"),
        head=preference or not pairs,
    )
    return _priced(
        name,
        steps=max(1, int(units // section.batch_size)) * section.epochs,
        tokens=tokens * section.epochs,
        seconds=flops / (gpus * gpu.flops * assumed("training_utilisation")),
        memory=memory,
        room=assumed("usable_memory") * gpu.memory,
        gpus=gpus,
        gpu=gpu,
    )


def _generation(
    name: str, model: Architecture, answers: int, prompt: float, answer: float, gpus: int, gpu: GPU
) -> StagePlan:
    """Decoding: each step reads all weights once and the cache of every answer in flight."""
    memory = generation_memory(model, gpu, int(prompt + answer))
    flying = memory["KV cache"] / (kv_bytes(model) * int(prompt + answer))
    cache = flying * (prompt + answer / 2) * kv_bytes(model)  # half an answer on average
    step = (2 * model.multiplied + cache) / (gpu.bandwidth * assumed("bandwidth_utilisation"))
    return _priced(
        name,
        steps=-(-answers // max(1, int(flying * gpus))),
        tokens=answers * answer,
        seconds=answers * answer * step / (flying * gpus),
        memory=memory,
        room=assumed("vllm_memory") * gpu.memory,
        gpus=gpus,
        gpu=gpu,
    )


def _scoring(
    name: str, model: Architecture, tokens: float, gpus: int, gpu: GPU, profile: Profile
) -> StagePlan:
    """Rewards: one forward pass, batches of 32 conversations."""
    batch = 32 * profile.reward_model.max_length
    layer = 2 * batch * (4 * model.hidden + 3 * model.intermediate)
    return _priced(
        name,
        steps=int(tokens // batch) + 1,
        tokens=tokens,
        seconds=2 * model.multiplied * tokens / (gpus * gpu.flops * assumed("scoring_utilisation")),
        memory={"weights": 2 * model.parameters, "activations": layer},
        room=assumed("usable_memory") * gpu.memory,
        gpus=gpus,
        gpu=gpu,
    )


def _priced(name: str, *, seconds: float, gpus: int, gpu: GPU, **rest: Any) -> StagePlan:
    hours = seconds / 3600
    return StagePlan(name=name, hours=hours, dollars=hours * gpus * gpu.price, **rest)


COLUMNS = ("stage", "steps", "tokens", "GB a device", "hours", "dollars")


def table(stages: list[StagePlan]) -> list[dict[str, Any]]:
    """One row a stage, rounded for readers, and their sum."""
    rows = [
        {
            "stage": stage.name,
            "steps": stage.steps,
            "tokens": f"{stage.tokens / 1e6:,.1f} M",
            "GB a device": f"{stage.total / GB:.1f} of {stage.room / GB:.0f}",
            "hours": f"{stage.hours:.2f}",
            "dollars": f"{stage.dollars:,.0f}",
        }
        for stage in stages
    ]
    hours, dollars = (sum(getattr(s, key) for s in stages) for key in ("hours", "dollars"))
    total = {"stage": "all", "hours": f"{hours:.2f}", "dollars": f"{dollars:,.0f}"}
    return [*rows, {**dict.fromkeys(COLUMNS, ""), **total}]


def as_text(stages: list[StagePlan]) -> str:
    """The plan for a terminal: the table, memory by component, warnings, assumptions."""
    rows = [dict(zip(COLUMNS, COLUMNS, strict=True)), *table(stages)]
    widths = {key: max(len(str(row[key])) for row in rows) for key in COLUMNS}
    lines = [
        "  ".join(
            str(row[key]).ljust(widths[key]) if key == "stage" else str(row[key]).rjust(widths[key])
            for key in COLUMNS
        )
        for row in rows
    ]
    lines += ["", "GB a device, by component (iterations are alike):"]
    for stage in stages:
        if not stage.name.startswith("iteration") or stage.name.startswith("iteration 1"):
            parts = ", ".join(f"{k} {v / GB:.1f}" for k, v in stage.memory.items() if v)
            lines.append(f"  {stage.name}: {parts}")
    lines += ["", "Assumed:"]
    lines += [f"  {name} = {value:,g}: {reason}" for name, (value, reason) in ASSUMPTIONS.items()]
    if warnings := [stage.warning for stage in stages if stage.warning]:
        lines += ["", *(f"warning: {text}" for text in warnings)]
    return "\n".join(lines)
