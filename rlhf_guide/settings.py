"""The settings of every stage as frozen dataclasses; the numbers are in `profiles`.

A field's metadata holds its range or its choices, which `parameters` checks.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from .errors import ParameterError


def _between(low: float, high: float = math.inf) -> Any:
    """A number of the closed range [low, high]."""
    return field(metadata={"low": low, "high": high})


def _above(low: float, high: float = math.inf) -> Any:
    """A number of the half-open range (low, high]."""
    return field(metadata={"low": low, "high": high, "open": True})


def _one_of(*choices: str) -> Any:
    """One of a few words."""
    return field(metadata={"choices": choices})


SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup")
LOSSES = ("sigmoid", "sigmoid_norm", "ipo")


@dataclass(frozen=True, kw_only=True)
class SFT:
    """Supervised fine-tuning with packing (paper §3.1).

    `batch_size` counts packed blocks of `max_length` tokens and is global: gradient accumulation
    follows from it, the per-device batch and the number of devices. `lora_rank` 0 means full
    fine-tuning; `max_samples` 0 means all demonstrations.
    """

    learning_rate: float = _above(0, 1)
    batch_size: int = _between(1)
    per_device_batch_size: int = _between(1)
    epochs: int = _between(1, 100)
    max_length: int = _between(16, 1_000_000)
    packing: bool
    completion_only: bool
    lora_rank: int = _between(0, 1024)
    warmup_ratio: float = _between(0, 0.5)
    scheduler: str = _one_of(*SCHEDULERS)
    weight_decay: float = _between(0, 1)
    max_samples: int = _between(0)


@dataclass(frozen=True, kw_only=True)
class RewardModel:
    """Bradley-Terry reward model (paper §2.1); `batch_size` counts preference pairs.

    `lora_layers` puts adapters into the last layers only (0 = all): the backward pass ends there,
    and on a CPU the layers below are read once, before training (see `frozen_layers`).
    Two options that the paper does not use: with `margin` a pair's rewards must differ by its
    difference of scores, and `centring` times the mean of (chosen + rejected)² joins the loss.
    """

    learning_rate: float = _above(0, 1)
    batch_size: int = _between(1)
    per_device_batch_size: int = _between(1)
    epochs: int = _between(1, 100)
    max_length: int = _between(16, 1_000_000)
    lora_rank: int = _between(0, 1024)
    lora_layers: int = _between(0, 1000)
    warmup_ratio: float = _between(0, 0.5)
    scheduler: str = _one_of(*SCHEDULERS)
    weight_decay: float = _between(0, 1)
    max_samples: int = _between(0)
    margin: bool = False
    centring: float = field(default=0.0, metadata={"low": 0, "high": 1})


@dataclass(frozen=True, kw_only=True)
class PreferenceModel:
    """Generative pairwise preference model (paper §2.1).

    `batch_size` counts packed blocks of `max_length` tokens when `packing`, comparisons otherwise.
    With `both_orders` every pair is read twice, with its answers exchanged; the paper draws one
    order a pair. `lora_layers` is as in `RewardModel`, but packed comparisons are read whole.
    """

    learning_rate: float = _above(0, 1)
    batch_size: int = _between(1)
    per_device_batch_size: int = _between(1)
    epochs: int = _between(1, 100)
    max_length: int = _between(16, 1_000_000)
    packing: bool
    both_orders: bool
    lora_rank: int = _between(0, 1024)
    lora_layers: int = _between(0, 1000)
    warmup_ratio: float = _between(0, 0.5)
    scheduler: str = _one_of(*SCHEDULERS)
    weight_decay: float = _between(0, 1)
    max_samples: int = _between(0)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How answers are sampled (paper §3.3): backend, longest answer in tokens, batch, top-p."""

    backend: str = _one_of("transformers", "vllm")
    max_new_tokens: int = _between(1, 100_000)
    batch_size: int = _between(1)
    top_p: float = _above(0, 1)


@dataclass(frozen=True, kw_only=True)
class DPO:
    """Direct preference optimisation (Eq. 5, Table 7); `batch_size` counts pairs.

    `beta` is the paper's eta. `offline_epochs` is the number of passes of the offline baseline
    (appendix B.3), `epochs` that of an online iteration; `max_samples` bounds the offline pairs
    (0 = all). `loss` and `label_smoothing` (the chance that a label is wrong; the authors' later
    script has 0.1) are explained in `dpo_losses`. Two terms that may join the loss (§3.3), both
    off: `nll_weight` times the chosen answer's mean negative log-likelihood, and
    `optimism_weight` times the log-probability of an answer of the reference, online only.
    Raises ParameterError for label smoothing with another loss than `sigmoid`.
    """

    beta: float = _above(0, 100)
    learning_rate: float = _above(0, 1)
    batch_size: int = _between(1)
    per_device_batch_size: int = _between(1)
    epochs: int = _between(1, 100)
    offline_epochs: int = _between(1, 100)
    max_length: int = _between(16, 1_000_000)
    lora_rank: int = _between(0, 1024)
    warmup_ratio: float = _between(0, 0.5)
    scheduler: str = _one_of(*SCHEDULERS)
    max_samples: int = _between(0)
    nll_weight: float = _between(0, 100)
    loss: str = field(default="sigmoid", metadata={"choices": LOSSES})
    label_smoothing: float = field(default=0.0, metadata={"low": 0, "high": 0.49})
    optimism_weight: float = field(default=0.0, metadata={"low": 0, "high": 1})

    def __post_init__(self) -> None:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ParameterError(
                f"dpo_label_smoothing is {self.label_smoothing} with dpo_loss={self.loss!r}; it is "
                "defined for 'sigmoid' only: set one of the two back."
            )


@dataclass(frozen=True, kw_only=True)
class Online:
    """Algorithm 2 (paper §3.3): iterations, prompts, samples, temperatures, pairs, reference.

    Half of `samples_per_prompt` are drawn at `temperature_high`, half at `temperature_low`, so
    the number is even. `length_penalty` is lambda of Eq. 9, in reward per character. `rank_by`
    names the model that chooses a prompt's best and worst answer; raises ParameterError where the
    preference model is asked for what needs rewards: a length penalty, another pair strategy.
    """

    iterations: int = _between(1, 100)
    prompts_per_iteration: int = _between(1)
    samples_per_prompt: int = _between(2, 1024)
    temperature_high: float = _above(0, 10)
    temperature_low: float = _above(0, 10)
    pair_strategy: str = _one_of("best_worst", "best_second", "best_random", "random")
    length_penalty: float = _between(0, 100)
    reference: str = _one_of("sft", "previous")
    warm_start: bool
    rank_by: str = field(
        default="reward_model", metadata={"choices": ("reward_model", "preference_model")}
    )

    def __post_init__(self) -> None:
        if self.rank_by == "reward_model":
            return
        if self.length_penalty or self.pair_strategy != "best_worst":
            raise ParameterError(
                "online_rank_by='preference_model' compares answers and gives no rewards: it needs "
                f"online_length_penalty=0.0 (now {self.length_penalty}) and "
                f"online_pair_strategy='best_worst' (now {self.pair_strategy!r})."
            )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out evaluation and the length study of §2.2 (Figure 3).

    `length_study_prompts` prompts with `length_study_samples` answers each give the correlation
    of reward and length; confidence intervals come from `bootstrap_samples` resamples of prompts.
    `judge_url` is the address of a language model behind the OpenAI protocol that judges answers
    as well (`none`: nobody is asked), `judge_model` the name it is served under. `reward_bench` is
    where RewardBench's pairs are: `none`, `hub`, or a file or folder (see `reward_bench`).
    """

    prompts: int = _between(1)
    samples_per_prompt: int = _between(1, 1024)
    temperature: float = _above(0, 10)
    validation_prompts: int = _between(1)
    validation_samples: int = _between(1, 1024)
    bootstrap_samples: int = _between(10, 1_000_000)
    length_study_prompts: int = _between(1)
    length_study_samples: int = _between(2, 1024)
    judged_prompts: int = _between(1)
    benchmark_items: int = _between(1)
    judge_url: str = "none"
    judge_model: str = "judge"
    reward_bench: str = "none"


@dataclass(frozen=True, kw_only=True)
class Profile:
    """All settings of a run. Models are a Hub id, a local folder or an embedded model's name.

    `tracking` names a tracker that follows training as well (see `tracking`); results do not
    depend on it.
    """

    name: str
    seed: int = _between(0, 2**31 - 1)
    data_source: str
    base_model: str
    reward_base_model: str
    dtype: str = _one_of("auto", "float32", "bfloat16")
    allow_download: bool
    tracking: str = _one_of("none", "trackio", "tensorboard", "wandb")
    sft: SFT
    reward_model: RewardModel
    preference_model: PreferenceModel
    generation: Generation
    dpo: DPO
    online: Online
    evaluation: Evaluation


def section_dict(section: Any) -> dict[str, Any]:
    """The fields of one section (or of a whole profile) as a plain dictionary."""
    return asdict(section)
