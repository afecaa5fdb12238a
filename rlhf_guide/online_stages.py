"""The five steps of one online iteration, each a stage of the run folder (see `online`).

The training step also starts on many devices, once the answers are drawn and scored:

    accelerate launch --config_file $(rlhf-guide config fsdp2) -m rlhf_guide.online_stages \
        --iteration 1 --profile paper --run-dir runs/paper
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from rlhf_guide.annotation import annotate
from rlhf_guide.batching import sample_rows
from rlhf_guide.dpo import train_dpo
from rlhf_guide.errors import DataError, ParameterError
from rlhf_guide.generation import generate
from rlhf_guide.models import choose_device
from rlhf_guide.online_report import annotation_metrics, response_summary, validation_metrics
from rlhf_guide.policies import POLICY, iteration_policy, model_folder, policy_stage, sft_policy
from rlhf_guide.profiles import Profile, section_dict
from rlhf_guide.reward_model import RewardScorer
from rlhf_guide.selection import build_pairs
from rlhf_guide.settings import Online
from rlhf_guide.tracking import write_history
from rlhf_guide.training import is_main_process
from rlhf_guide.workspace import Stage, Workspace, read_jsonl, write_json, write_jsonl

Scorer = Callable[[], RewardScorer]


def sample_answers(ws: Workspace, t: int, profile: Profile) -> Stage:
    """Draw n answers a prompt from π_{t−1}, n/2 at each temperature (Algorithm 2, line 4)."""
    online = profile.online
    config = {
        **section_dict(profile.generation),
        "prompts": online.prompts_per_iteration,
        "temperatures": mixed_temperatures(online),
        "seed": profile.seed + t,  # the same seed in every iteration would repeat the noise
    }
    stage = ws.stage(stage_name(t, "generation"), config, ["data", policy_stage(t - 1)])
    if not stage.done:
        prompts = sample_rows(load_slice(ws, t), online.prompts_per_iteration, profile.seed)
        model, adapter = iteration_policy(ws, t - 1)
        rows = generate(
            model,
            prompts,
            profile.generation,
            config["temperatures"],
            config["seed"],
            stage.dir / "generations.jsonl",
            _dtype(profile),
            adapter=adapter,
        )
        stage.finish(response_summary(rows))
        gc.collect()
    return stage


def score_answers(ws: Workspace, t: int, profile: Profile, scorer: Scorer) -> Stage:
    """Score every answer with the reward model (line 5, first half)."""
    inputs = [stage_name(t, "generation"), "reward_model"]
    config = {"max_length": profile.reward_model.max_length}
    stage = ws.stage(stage_name(t, "annotation"), config, inputs)
    if not stage.done:
        generations = read_jsonl(ws.load(inputs[0]).dir / "generations.jsonl")
        rows = annotate(generations, scorer(), stage.dir / "annotated.jsonl")
        stage.finish(annotation_metrics(rows))
    return stage


def select_pairs(ws: Workspace, t: int, profile: Profile) -> Stage:
    """Keep one pair a prompt, best against worst by default (line 5, second half)."""
    config = {
        "strategy": profile.online.pair_strategy,
        "length_penalty": profile.online.length_penalty,
        "seed": profile.seed,
        "iteration": t,
    }
    stage = ws.stage(stage_name(t, "pairs"), config, [stage_name(t, "annotation")])
    if not stage.done:
        rows = read_jsonl(ws.load(stage_name(t, "annotation")).dir / "annotated.jsonl")
        pairs, counts = build_pairs(rows, **config)
        write_jsonl(stage.dir / "pairs.jsonl", pairs)
        stage.finish(counts)
    return stage


def open_policy(ws: Workspace, t: int, profile: Profile) -> Stage:
    """The stage in which π_t is trained, with everything that its result depends on."""
    online = profile.online
    config = {
        **section_dict(profile.dpo),
        "reference": online.reference,
        "warm_start": online.warm_start,
        "seed": profile.seed + t,
    }
    pairs = [stage_name(i, "pairs") for i in _replayed(t, online)]
    inputs = ["sft", *pairs, policy_stage(t - 1)]
    return ws.stage(stage_name(t, "dpo"), config, list(dict.fromkeys(inputs)))


def _replayed(t: int, online: Online) -> list[int]:
    """The iterations whose pairs train π_t."""
    return [t] if online.warm_start else list(range(1, t + 1))


def train_policy(ws: Workspace, t: int, profile: Profile, previous_adapter: Path | None) -> Stage:
    """Train π_t with DPO on this iteration's pairs (line 3).

    Warm start: begin at π_{t−1} and see only the new pairs. Otherwise begin at the reference and
    see the pairs of all iterations so far, as Algorithm 2 is written. The reference is π0, or with
    ``reference="previous"`` π_{t−1}, which is then also the start (the released script's choice).
    """
    online = profile.online
    moving = online.reference == "previous"
    stage = open_policy(ws, t, profile)
    if not stage.done:
        pairs = [row for i in _replayed(t, online) for row in load_pairs(ws, i)]
        reference = previous_adapter if moving and t > 1 else sft_policy(ws)[0]
        result = train_dpo(
            reference,
            pairs,
            profile.dpo,
            stage.dir / POLICY,
            profile.seed + t,
            _dtype(profile),
            initial_adapter=None if moving or not online.warm_start else previous_adapter,
            merge=moving,
            track=profile.tracking,
        )
        if is_main_process():
            write_json(stage.dir / "history.json", result["history"])
            write_history(stage.dir, result["history"], stage.name)
            stage.finish(result["metrics"])
        gc.collect()
    return stage


def validate(ws: Workspace, t: int, profile: Profile, scorer: Scorer) -> Stage:
    """Sample π_t's answers to the validation prompts and score them; t = 0 is the SFT policy.

    Seed and prompts are the same for every t. Metrics: mean reward, true utility where the
    prompts have one, each with its interval, and lengths.
    """
    settings = profile.evaluation
    config = {
        **section_dict(profile.generation),
        "prompts": settings.validation_prompts,
        "temperatures": [settings.temperature] * settings.samples_per_prompt,
        "seed": profile.seed,
        "bootstrap_samples": settings.bootstrap_samples,
    }
    stage = ws.stage(stage_name(t, "validation"), config, ["data", "reward_model", policy_stage(t)])
    if not stage.done:
        stored = read_jsonl(ws.load("data").dir / "prompts_validation.jsonl")
        model, adapter = iteration_policy(ws, t)
        rows = generate(
            model,
            sample_rows(stored, settings.validation_prompts, profile.seed),
            profile.generation,
            config["temperatures"],
            config["seed"],
            stage.dir / "generations.jsonl",
            _dtype(profile),
            adapter=adapter,
        )
        annotated = annotate(rows, scorer(), stage.dir / "annotated.jsonl")
        stage.finish(validation_metrics(annotated, settings.bootstrap_samples, profile.seed))
        gc.collect()
    return stage


def lazy_scorer(ws: Workspace, profile: Profile) -> Scorer:
    """Return a function that loads the run's reward model at its first call and then keeps it."""

    @cache
    def scorer() -> RewardScorer:
        folder = model_folder(ws.load("reward_model"))
        return RewardScorer(folder, _dtype(profile), profile.reward_model.max_length)

    return scorer


def load_slice(ws: Workspace, t: int) -> list[dict]:
    """Return the prompts of iteration t; raises DataError when there is no such slice."""
    path = ws.load("data").dir / f"prompts_online_{t}.jsonl"
    if not path.exists():
        raise DataError(
            f"The data stage has no prompts for iteration {t} ({path.name}): set "
            f"online_iterations to {t - 1} or prepare another slice of prompts."
        )
    return read_jsonl(path)


def load_pairs(ws: Workspace, t: int) -> list[dict]:
    """Return the preference pairs that iteration t has built."""
    return read_jsonl(ws.load(stage_name(t, "pairs")).dir / "pairs.jsonl")


def mixed_temperatures(online: Online) -> list[float]:
    """Return one temperature a sample: the first half high, the second half low."""
    half = online.samples_per_prompt // 2
    if 2 * half != online.samples_per_prompt:
        raise ParameterError(
            f"online_samples_per_prompt is {online.samples_per_prompt}; it must be even, half at "
            "each temperature."
        )
    return [online.temperature_high] * half + [online.temperature_low] * half


def stage_name(t: int, part: str = "") -> str:
    """Name the stage of iteration t, or of one of its steps."""
    return f"online/iteration_{t}/{part}" if part else f"online/iteration_{t}"


def _dtype(profile: Profile) -> torch.dtype:
    return choose_device(profile.dtype)[1]


def launch_iteration(t: int, arguments: list[str] | None = None) -> None:
    """Choose the pairs of iteration t and train π_t on them, under a launcher or without."""
    from rlhf_guide.launch import main

    def open_stage(ws: Workspace) -> Stage:
        select_pairs(ws, t, ws.profile)
        return open_policy(ws, t, ws.profile)

    def train_stage(stage: Stage) -> dict[str, Any]:
        ws = stage.workspace
        previous = ws.load(policy_stage(t - 1)).dir / POLICY if t > 1 else None
        return {"metrics": train_policy(ws, t, ws.profile, previous).metrics}

    main("dpo", open_stage, train_stage, arguments)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m rlhf_guide.online_stages", add_help=False)
    parser.add_argument("--iteration", type=int, required=True, help="t, from 1 on")
    given, rest = parser.parse_known_args()
    launch_iteration(given.iteration, rest)
