"""The gallery's runs that train: a random two-layer model, the course's trainers, a few steps.

The failures shown lie in labels and rates, not in the language, so a model that knows none shows
them as well as a large one, within seconds and at every profile. Prompts, answers and their true
order come from the miniature.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, set_seed

from data_prep.embedded import load_candidates, load_demonstrations, load_prompts
from rlhf_guide import detectors, dpo, reward_model, sft
from rlhf_guide.chat import end_of_turn_id
from rlhf_guide.detectors import LN2
from rlhf_guide.gallery_case import Case, Panel
from rlhf_guide.models import load_policy, load_tokenizer, resolve_model
from rlhf_guide.oracle import utility
from rlhf_guide.profiles import load_profile
from rlhf_guide.workspace import Workspace

SMALL = load_profile("smoke")
RATE, HIGH_RATE = 5e-3, 1.0  # all weights of a tiny model train at a larger rate than adapters do
PAIRS, FEW_PAIRS, FEW_TURNS = 32, 8, 4  # few where each step goes through the whole vocabulary
EPOCHS = {"sft": 5, "reward_model": 4, "dpo": 3}


def no_end_token(ws: Workspace) -> Case:
    """Fine-tune with and without the label of the end token, as when padding equals it."""
    tokenizer = load_tokenizer(_tiny())
    end = end_of_turn_id(tokenizer)
    drawn = _shuffled(load_demonstrations(), ws.profile.seed)[: 4 * FEW_TURNS]
    shortest = sorted(drawn, key=lambda row: _words(row["messages"]))[:FEW_TURNS]
    rows = list(sft.build_dataset(tokenizer, shortest, SMALL.sft)[0])
    masked = [
        {**row, "labels": [sft.IGNORED if t == end else t for t in row["labels"]]} for row in rows
    ]
    curves = [_end_losses(kind, rows, ws.profile.seed) for kind in (rows, masked)]
    found = [detectors.no_end_token([r["labels"] for r in kind], end) for kind in (rows, masked)]
    return Case((Panel("step", "end token's loss, nats", *curves),), *found)


def _end_losses(rows: Sequence[dict], measured: Sequence[dict], seed: int) -> list[float]:
    """The end token's loss on `measured` after each step of fine-tuning on `rows`."""
    settings = replace(
        SMALL.sft,
        packing=False,
        lora_rank=0,
        learning_rate=RATE,
        **_batches(FEW_TURNS),
        epochs=EPOCHS["sft"],
    )
    set_seed(seed)
    with TemporaryDirectory() as folder:
        model, tokenizer = load_policy(_tiny(), torch.float32), load_tokenizer(_tiny())
        data = Dataset.from_list(list(rows))
        trainer = sft.build_trainer(model, tokenizer, data, settings, folder, seed, torch.float32)
        trainer.remove_callback(PrinterCallback)
        curve = _Curve(lambda model: _end_loss(model, measured))
        trainer.add_callback(curve)
        trainer.train()
    return curve.values


class _Curve(TrainerCallback):
    """Measures the model after every optimiser step."""

    def __init__(self, measure: Callable[[Any], float]):
        self.measure = measure
        self.values: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.values.append(self.measure(model))


def _end_loss(model: Any, rows: Sequence[dict]) -> float:
    return float(np.mean([token_losses(model, row["input_ids"])[-1] for row in rows]))


@torch.no_grad()
def token_losses(
    model: Any, ids: Sequence[int], positions: Sequence[int] | None = None
) -> np.ndarray:
    """−log p of every token after the first, in nats, shape (tokens − 1,)."""
    tokens = torch.tensor([ids], device=model.device)
    place = None if positions is None else torch.tensor([positions], device=model.device)
    logits = model(input_ids=tokens, position_ids=place, use_cache=False).logits[0, :-1].float()
    return -logits.log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0].cpu().numpy()


def swapped_labels(ws: Workspace) -> Case:
    """Train a reward model on trusted pairs as they are, and on the same pairs turned round."""
    seed = ws.profile.seed
    runs = [_reward_run(seed, order) for order in ("trusted", "turned")]
    loss = Panel("step", "training loss, nats", *(run.losses for run in runs), limit=LN2)
    found = [detectors.swapped_labels(run.better, run.worse) for run in runs]
    return Case((loss, _margins(runs)), *found)


def noisy_reward_model(ws: Workspace) -> Case:
    """Train a reward model on trusted pairs, and with half of them turned round at random."""
    runs = [_reward_run(ws.profile.seed, order) for order in ("trusted", "half turned")]
    found = [detectors.noisy_reward_model(run.better, run.worse) for run in runs]
    return Case((_margins(runs),), *found)


def length_hack(ws: Workspace) -> Case:
    """Train a reward model on trusted pairs, and with the longer answer of each put first."""
    pairs = trusted_pairs(ws.profile.seed)
    words = [[_words(pair[side]) for pair in pairs] for side in ("chosen", "rejected")]
    runs = [_reward_run(ws.profile.seed, order) for order in ("trusted", "longer first")]
    found = [detectors.length_hack(run.better, run.worse, *words) for run in runs]
    shorter = np.less(*words)
    return Case((_margins(runs, shorter, "pair with a shorter better answer"),), *found)


@dataclass(frozen=True)
class _RewardRun:
    """Training losses, and rewards of the trusted pairs' better and worse answers."""

    losses: list[float]
    better: np.ndarray
    worse: np.ndarray


@cache
def _reward_run(seed: int, order: str) -> _RewardRun:
    """Train a reward model on the trusted pairs in an order, and score them in the true one."""
    pairs = trusted_pairs(seed)
    coins = np.random.default_rng([seed, 1]).permutation(np.arange(len(pairs)) % 2)
    turned = {
        "trusted": [False] * len(pairs),
        "turned": [True] * len(pairs),
        "half turned": coins == 1,
        "longer first": [_words(pair["chosen"]) < _words(pair["rejected"]) for pair in pairs],
    }[order]
    labelled = [_turned(pair) if turn else pair for pair, turn in zip(pairs, turned, strict=True)]
    settings = replace(
        SMALL.reward_model,
        lora_rank=0,
        learning_rate=RATE,
        **_batches(8),
        epochs=EPOCHS["reward_model"],
        max_samples=0,
    )
    with TemporaryDirectory() as folder:
        result = reward_model.train_reward_model(_tiny(), labelled, settings, folder, seed)
        scorer = reward_model.RewardScorer(folder, torch.float32)
        better, worse = (scorer.score([p[side] for p in pairs]) for side in ("chosen", "rejected"))
    return _RewardRun([row["loss"] for row in result["history"]], better, worse)


def _margins(runs: Sequence[_RewardRun], which: Any = slice(None), x: str = "pair") -> Panel:
    """Rewards of the better minus the worse answers, smallest first."""
    curves = [np.sort((run.better - run.worse)[which]).tolist() for run in runs]
    return Panel(f"{x}, by margin", "reward, better − worse", *curves, limit=0.0)


def learning_rate_too_high(ws: Workspace) -> Case:
    """DPO on trusted pairs, three times over, at a fitting rate and at a far larger one."""
    seed, epochs = ws.profile.seed, EPOCHS["dpo"]
    pairs = sorted(trusted_pairs(seed), key=lambda p: _words(p["chosen"]) + _words(p["rejected"]))
    curves = []
    for rate in (RATE, HIGH_RATE):
        settings = replace(
            SMALL.dpo,
            lora_rank=0,
            learning_rate=rate,
            scheduler="constant_with_warmup",  # a rate that falls to zero mends itself
            **_batches(2),
            epochs=epochs,
        )
        with TemporaryDirectory() as folder:
            result = dpo.train_dpo(
                _tiny(), pairs[:FEW_PAIRS], settings, folder, seed, torch.float32
            )
        curves.append([row["loss"] for row in result["history"]])
    found = [detectors.learning_rate_too_high(c[-(len(c) // epochs) :]) for c in curves]
    return Case((Panel("step", "DPO loss, nats", *curves, limit=LN2, log=True),), *found)


def trusted_pairs(seed: int) -> list[dict[str, Any]]:
    """`PAIRS` pairs of the miniature whose order the oracle knows, one a prompt.

    The better answer is the shorter in every second pair, so length tells nothing. Of a prompt's
    candidates the pair with the largest difference in utility is taken.
    """
    candidates = load_candidates("preference_train")
    pairs: list[dict[str, Any]] = []
    for prompt in _shuffled(load_prompts("preference_train"), seed):
        pair = _clearest(prompt, candidates[prompt["prompt_id"]], shorter=len(pairs) % 2 == 0)
        if pair is not None:
            pairs.append(pair)
        if len(pairs) == PAIRS:
            break
    return pairs


def _clearest(prompt: dict, candidates: Sequence[dict], shorter: bool) -> dict[str, Any] | None:
    """The pair of the largest gap whose better answer is the shorter (or the longer), or None."""
    scored = [
        (utility(prompt, c["text"], c["finish_reason"]).total, len(c["text"].split()), c["text"])
        for c in candidates
    ]
    gaps = [
        (u - v, better, worse)
        for (u, words, better), (v, others, worse) in permutations(scored, 2)
        if u > v and (words < others if shorter else words > others)
    ]
    if not gaps:
        return None
    _, better, worse = max(gaps)
    answers = {"chosen": better, "rejected": worse}
    return {"prompt_id": prompt["prompt_id"]} | {
        side: [*prompt["messages"], {"role": "assistant", "content": text}]
        for side, text in answers.items()
    }


def _turned(pair: dict[str, Any]) -> dict[str, Any]:
    return {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]}


def _words(messages: Sequence[dict[str, str]]) -> int:
    """Words of the last answer."""
    return len(messages[-1]["content"].split())


def _shuffled(rows: Sequence[Any], seed: int) -> list[Any]:
    return [rows[place] for place in np.random.default_rng(seed).permutation(len(rows))]


def _batches(size: int) -> dict[str, int]:
    return {"batch_size": size, "per_device_batch_size": size}


def _tiny() -> Path:
    return resolve_model(SMALL.base_model)
