"""The main result over several seeds: online DPO against the SFT policy and a matched control.

    rlhf-guide study online_seeds --run-dir runs/cpu --seeds 3

Each seed runs all iterations of Algorithm 2 from the run's SFT policy with the run's reward model,
and chooses its checkpoint on the validation prompts. Beside it stands offline DPO on as many
stored pairs as the online run has prompts, in about as many steps, with the same settings. The
first seed is the run's own; each further one has a run folder beside it, which borrows the finished
stages. The course compares one run with offline DPO on fewer pairs: what is missing there is here.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_guide.batching import sample_rows
from rlhf_guide.dpo import train_dpo
from rlhf_guide.evaluation import bootstrap_mean, paired_difference
from rlhf_guide.evaluation_answers import evaluation_answers, evaluation_prompts
from rlhf_guide.files import append_jsonl, read_jsonl
from rlhf_guide.generation import answer_config
from rlhf_guide.models import choose_device
from rlhf_guide.online import run_online
from rlhf_guide.online_arms import judge_policy, require_truth, true_utilities
from rlhf_guide.policies import chosen_policy, policy_location, sft_policy
from rlhf_guide.profiles import section_dict
from rlhf_guide.workspace import Stage, Workspace, open_run

Row = dict[str, Any]

STAGE = "online_seeds"
ANSWERS = 4  # to each evaluation prompt, by every seed's policies
BORROWED = ("data", "sft", "reward_model")
POLICIES = ("offline_dpo_matched", "online_dpo")
DIFFERENCES = {
    "online_minus_sft": ("online_dpo", "sft"),
    "online_minus_matched": ("online_dpo", "offline_dpo_matched"),
    "matched_minus_sft": ("offline_dpo_matched", "sft"),
}


def run_seeds(ws: Workspace, seeds: int = 3) -> Stage:
    """Train both policies with every seed, judge them, finish with the intervals.

    Raises MissingStage before the run has its reward model and its SFT policy's answers, DataError
    for real data, whose true utility nobody knows.
    """
    profile = ws.profile
    require_truth(evaluation_prompts(ws, profile))
    config = {
        "dpo": section_dict(profile.dpo),
        "online": section_dict(profile.online),
        **answer_config(profile.generation),
        "answers": ANSWERS,
        "temperature": profile.evaluation.temperature,
        "seed": profile.seed,
        "seeds": seeds,
    }
    stage = ws.stage(STAGE, config, [*BORROWED, "evaluation_answers_sft"])
    if not stage.done:
        file = stage.dir / "utilities.jsonl"
        for seed in range(profile.seed, profile.seed + seeds):
            done = read_jsonl(file) if file.exists() else []
            for name in POLICIES:
                if not any((row["seed"], row["policy"]) == (seed, name) for row in done):
                    found = _utilities(ws, stage, name, seed)
                    append_jsonl(file, [{"seed": seed, "policy": name, **found}])
                    print(f"seed {seed}: {name} {np.mean(found['utility']):.3f}", flush=True)
        start, _ = true_utilities(evaluation_answers(ws, profile, "sft"))
        stage.finish(summary(start, read_jsonl(file), profile.evaluation.bootstrap_samples))
    return stage


def seed_run(ws: Workspace, seed: int) -> Workspace:
    """The run folder of a seed: the run itself, or one beside it that borrows its first stages."""
    if seed == ws.profile.seed:
        return ws
    path = ws.path.parent / f"{ws.path.name}_seed_{seed}"
    other = open_run(replace(ws.profile, seed=seed), path)
    for name in BORROWED:
        if not (other.path / name).exists():
            (other.path / name).symlink_to(os.path.relpath(ws.path / name, other.path))
    return other


def _utilities(ws: Workspace, stage: Stage, name: str, seed: int) -> Row:
    profile = replace(ws.profile, seed=seed)
    if name == "online_dpo":
        run = seed_run(ws, seed)
        run_online(run, profile)
        policy = chosen_policy(run)
    else:
        trained = _matched(ws, stage.dir / f"offline_{seed}", seed)
        policy = policy_location(sft_policy(ws)[0], trained)
    prompts = evaluation_prompts(ws, ws.profile)
    utilities, characters = judge_policy(policy, prompts, ANSWERS, seed, profile)
    return {"utility": utilities, "characters": characters}


def _matched(ws: Workspace, folder: Path, seed: int) -> Path:
    """Offline DPO on as many stored pairs as the online run has prompts."""
    online, dpo = ws.profile.online, ws.profile.dpo
    stored = read_jsonl(ws.load("data").dir / "preference_train.jsonl")
    pairs = sample_rows(stored, online.iterations * online.prompts_per_iteration, seed)
    dtype = choose_device(ws.profile.dtype)[1]
    train_dpo(sft_policy(ws)[0], pairs, dpo, folder, seed, dtype)
    return folder


def summary(start: Sequence[float], rows: Sequence[Row], n_boot: int) -> Row:
    """Utilities and differences with intervals over prompts, and each seed's own difference.

    A prompt's utility is averaged over the seeds first. `start` are the SFT policy's utilities.
    """
    by_policy = {
        name: np.array([row["utility"] for row in rows if row["policy"] == name])
        for name in POLICIES
    }
    values = {"sft": np.array([start]), **by_policy}
    means = {name: value.mean(axis=0) for name, value in values.items()}
    table: Row = {name: bootstrap_mean(mean, n_boot=n_boot) for name, mean in means.items()}
    for key, (name, other) in DIFFERENCES.items():
        table[key] = paired_difference(means[name], means[other], n_boot=n_boot)
        table[f"{key}_of_seeds"] = (values[name] - values[other]).mean(axis=1).tolist()
    return table
