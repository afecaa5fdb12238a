"""The steps of one online iteration, each a stage of the run folder (see `online`).

The training step also starts on many devices, once the answers are drawn and scored (and those of
the reference drawn, see `sample_reference`):

    accelerate launch --config_file $(rlhf-guide config fsdp2) -m rlhf_guide.online_stages \
        --iteration 1 --profile paper --run-dir runs/paper
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from rlhf_guide.annotation import annotate
from rlhf_guide.batching import sample_rows
from rlhf_guide.comparisons import Judge
from rlhf_guide.dpo import train_dpo
from rlhf_guide.errors import DataError, ParameterError
from rlhf_guide.generation import answer_config, generate
from rlhf_guide.models import choose_device
from rlhf_guide.online_report import annotation_metrics, response_summary, validation_metrics
from rlhf_guide.policies import POLICY, iteration_policy, model_folder, policy_stage, sft_policy
from rlhf_guide.preference_model import PreferenceScorer
from rlhf_guide.profiles import Profile, section_dict
from rlhf_guide.reward_model import RewardScorer
from rlhf_guide.selection import build_judged_pairs, build_pairs
from rlhf_guide.settings import Online
from rlhf_guide.tracking import write_history
from rlhf_guide.training import is_main_process
from rlhf_guide.workspace import Stage, Workspace, read_jsonl, write_json, write_jsonl

Scorer = Callable[[], RewardScorer]
ANSWERS = "generations.jsonl"  # the file of every stage that samples
REWARDS = "annotated.jsonl"  # and of every one that scores


def sample_answers(ws: Workspace, t: int, profile: Profile) -> Stage:
    """Draw n answers a prompt from π_{t−1}, n/2 at each temperature (Algorithm 2, line 4)."""
    return _sample(ws, t, open_answers(ws, t, profile), t - 1, profile)


def open_answers(ws: Workspace, t: int, profile: Profile) -> Stage:
    """The stage of iteration t's answers, with everything that they depend on."""
    temperatures = mixed_temperatures(profile.online)
    return _open_sampling(ws, t, "generation", t - 1, temperatures, profile)


def sample_reference(ws: Workspace, t: int, profile: Profile) -> Stage:
    """Draw one answer a prompt from the reference, for the optimistic term of `dpo_losses`.

    At temperature 1, since the term is an expectation over what the reference itself writes. The
    seed is that of `sample_answers`: in iteration 1 the reference is also the policy that answers,
    and this is its first answer once more, if ``temperature_high`` is 1.
    """
    source = t - 1 if profile.online.reference == "previous" else 0
    stage = _open_sampling(ws, t, "reference", source, [1.0], profile)
    return _sample(ws, t, stage, source, profile)


def _open_sampling(
    ws: Workspace, t: int, part: str, source: int, temperatures: list[float], profile: Profile
) -> Stage:
    """The stage in which π_source answers the prompts of iteration t."""
    config = {
        **answer_config(profile.generation),
        "prompts": profile.online.prompts_per_iteration,
        "temperatures": temperatures,
        "seed": profile.seed + t,  # the same seed in every iteration would repeat the noise
    }
    return ws.stage(stage_name(t, part), config, ["data", policy_stage(source)])


def _sample(ws: Workspace, t: int, stage: Stage, source: int, profile: Profile) -> Stage:
    if not stage.done:
        model, adapter = iteration_policy(ws, source)
        rows = generate(
            model,
            iteration_prompts(ws, t, profile),
            profile.generation,
            stage.config["temperatures"],
            stage.config["seed"],
            stage.dir / ANSWERS,
            _dtype(profile),
            adapter=adapter,
        )
        stage.finish(response_summary(rows))
        gc.collect()
    return stage


def score_answers(ws: Workspace, t: int, profile: Profile, scorer: Scorer) -> Stage:
    """Score every answer with the reward model (line 5, first half).

    ``fewer_answers`` of the metrics counts prompts with fewer answers than were asked for.
    """
    stage = open_rewards(ws, t, profile)
    if not stage.done:
        rows = annotate(load_answers(ws, t), scorer(), stage.dir / REWARDS)
        wanted = profile.online.samples_per_prompt
        fewer = sum(len(row["responses"]) < wanted for row in rows)
        stage.finish({**annotation_metrics(rows), "fewer_answers": fewer})
    return stage


def open_rewards(ws: Workspace, t: int, profile: Profile) -> Stage:
    """The stage of iteration t's rewards, with everything that they depend on."""
    config = {"max_length": profile.reward_model.max_length}
    return ws.stage(
        stage_name(t, "annotation"), config, [stage_name(t, "generation"), "reward_model"]
    )


def select_pairs(ws: Workspace, t: int, profile: Profile) -> Stage:
    """Keep one pair a prompt, best against worst by default (line 5, second half).

    ``online.rank_by`` says whether rewards or the pair model's comparisons rank the answers.
    """
    online = profile.online
    judged = online.rank_by == "preference_model"
    config = {
        "rank_by": online.rank_by,
        "strategy": online.pair_strategy,
        "length_penalty": online.length_penalty,
        "seed": profile.seed,
        "iteration": t,
    }
    inputs = [stage_name(t, "annotation"), *["preference_model"] * judged]
    stage = ws.stage(stage_name(t, "pairs"), config, inputs)
    if not stage.done:
        rows = read_jsonl(ws.load(inputs[0]).dir / REWARDS)
        if judged:
            pairs, counts = build_judged_pairs(rows, _pair_judge(ws, profile), t)
        else:
            pairs, counts = build_pairs(
                rows, online.pair_strategy, online.length_penalty, profile.seed, t
            )
        write_jsonl(stage.dir / "pairs.jsonl", pairs)
        stage.finish(counts)
    return stage


def _pair_judge(ws: Workspace, profile: Profile) -> Judge:
    folder = model_folder(ws.load("preference_model"))
    return PreferenceScorer(folder, _dtype(profile)).probability


def open_policy(ws: Workspace, t: int, profile: Profile) -> Stage:
    """The stage in which π_t is trained, with everything that its result depends on."""
    online = profile.online
    config = {
        **section_dict(profile.dpo),
        "reference": online.reference,
        "warm_start": online.warm_start,
        "seed": profile.seed + t,
    }
    parts = ("pairs", "reference") if profile.dpo.optimism_weight else ("pairs",)
    drawn = [stage_name(i, part) for i in _replayed(t, online) for part in parts]
    inputs = ["sft", *drawn, policy_stage(t - 1)]
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
        load = load_pairs_with_reference if profile.dpo.optimism_weight else load_pairs
        pairs = [row for i in _replayed(t, online) for row in load(ws, i)]
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
        **answer_config(profile.generation),
        "prompts": settings.validation_prompts,
        "temperatures": [settings.temperature] * settings.validation_samples,
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
            stage.dir / ANSWERS,
            _dtype(profile),
            adapter=adapter,
        )
        annotated = annotate(rows, scorer(), stage.dir / REWARDS)
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


def iteration_prompts(ws: Workspace, t: int, profile: Profile) -> list[dict]:
    """Return the prompts that are answered in iteration t, as many as the profile asks for."""
    return sample_rows(load_slice(ws, t), profile.online.prompts_per_iteration, profile.seed)


def load_answers(ws: Workspace, t: int) -> list[dict]:
    """Return the answers that iteration t has drawn."""
    return read_jsonl(ws.load(stage_name(t, "generation")).dir / ANSWERS)


def load_pairs(ws: Workspace, t: int) -> list[dict]:
    """Return the preference pairs that iteration t has built."""
    return read_jsonl(ws.load(stage_name(t, "pairs")).dir / "pairs.jsonl")


def load_pairs_with_reference(ws: Workspace, t: int) -> list[dict]:
    """Return the pairs of iteration t with the reference's answer to each pair's prompt.

    ``reference`` is a conversation like ``chosen``, ``reference_finished`` whether the answer ended
    by itself.
    """
    drawn = read_jsonl(ws.load(stage_name(t, "reference")).dir / ANSWERS)
    return with_reference(load_pairs(ws, t), drawn)


def with_reference(pairs: Sequence[dict], drawn: Sequence[dict]) -> list[dict]:
    """Return the pairs with the first of the answers drawn for each one's prompt, as reference."""
    answers = {row["prompt_id"]: row["responses"][0] for row in drawn}
    found = []
    for pair in pairs:
        answer = answers[pair["prompt_id"]]
        turn = {"role": "assistant", "content": answer["text"]}
        finished = answer["finish_reason"] != "length"
        conversation = [*pair["chosen"][:-1], turn]
        found.append({**pair, "reference": conversation, "reference_finished": finished})
    return found


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
