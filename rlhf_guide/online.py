"""Iterative online DPO: Algorithm 2 of the paper, one iteration a call.

    for t = 1 … T:
        sample n answers a prompt from π_{t−1}, half at each temperature      "generation"
        score them with the reward model                                     "annotation"
        keep the best and the worst of each prompt                           "pairs"
        DPO from π_{t−1}, reference fixed at the SFT policy π0               "dpo" → π_t
        sample and score answers to the validation prompts                   "validation"
    return the π_t with the highest validation reward

Each step is a stage of its own in the run folder, so a killed run continues at the step it was in
and repeats nothing that had finished.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_guide.errors import DataError, ParameterError
from rlhf_guide.online_report import describe, iteration_row
from rlhf_guide.online_stages import (
    lazy_scorer,
    load_slice,
    sample_answers,
    sample_reference,
    score_answers,
    select_pairs,
    stage_name,
    train_policy,
    validate,
)
from rlhf_guide.policies import POLICY
from rlhf_guide.profiles import Profile
from rlhf_guide.reward_model import RewardScorer
from rlhf_guide.workspace import Workspace, read_jsonl, write_json

Say = Callable[[str], None]


def run_online(
    ws: Workspace, profile: Profile, on_progress: Say = print, criterion: str = "reward"
) -> dict[str, Any]:
    """Run all iterations of Algorithm 2 and choose the checkpoint (lines 1–7).

    Returns what `choose_checkpoint` returns. Finished steps are read, not repeated.
    """
    check_slices(ws, profile)
    scorer = lazy_scorer(ws, profile)
    validate(ws, 0, profile, scorer)
    previous = None
    for t in range(1, profile.online.iterations + 1):
        result = run_iteration(ws, t, profile, previous, scorer, on_progress)
        previous = result["adapter"]
        on_progress(describe(result["metrics"]))
    return choose_checkpoint(ws, profile, criterion)


def run_iteration(
    ws: Workspace,
    t: int,
    profile: Profile,
    previous_adapter: Path | None = None,
    scorer: Callable[[], RewardScorer] | None = None,
    on_progress: Say = lambda line: None,
) -> dict[str, Any]:
    """Run iteration t: sample from π_{t−1}, score, pair, train π_t, validate it.

    ``previous_adapter`` is the folder that iteration t−1 returned (None for t = 1). ``scorer``
    comes from `lazy_scorer` and keeps one reward model in memory over all iterations. Returns
    ``adapter`` (π_t's folder) and ``metrics`` (one flat row for the per-iteration table).
    """
    scorer = scorer or lazy_scorer(ws, profile)
    if profile.online.rank_by == "preference_model":
        ws.load("preference_model")  # if it is missing, say so before anything is sampled
    on_progress(f"iteration {t}: sampling")
    generation = sample_answers(ws, t, profile)
    if profile.dpo.optimism_weight:
        sample_reference(ws, t, profile)
    on_progress(f"iteration {t}: scoring")
    annotation = score_answers(ws, t, profile, scorer)
    pairs = select_pairs(ws, t, profile)
    on_progress(f"iteration {t}: training on {pairs.metrics['pairs']} pairs")
    trained = train_policy(ws, t, profile, previous_adapter)
    on_progress(f"iteration {t}: validating")
    validation = validate(ws, t, profile, scorer)
    stage = ws.stage(
        stage_name(t),
        {"iteration": t},
        [part.name for part in (generation, annotation, pairs, trained, validation)],
    )
    if not stage.done:
        stage.finish(
            iteration_row(t, annotation.metrics, pairs.metrics, trained.metrics, validation.metrics)
        )
    return {"iteration": t, "adapter": trained.dir / POLICY, "metrics": stage.metrics}


def choose_checkpoint(ws: Workspace, profile: Profile, criterion: str = "reward") -> dict[str, Any]:
    """Pick the best of π_1 … π_T on the validation prompts (line 7) and record it.

    ``criterion`` is "reward" (the proxy, all that real data offers) or "utility" (the miniature's
    truth). Returns ``iteration``, ``criterion`` and ``history``, one row an iteration.
    """
    if criterion not in ("reward", "utility"):
        raise ParameterError(f"criterion is {criterion!r}; it must be 'reward' or 'utility'.")
    numbers = range(1, profile.online.iterations + 1)
    stage = ws.stage("online", {"criterion": criterion}, [stage_name(t) for t in numbers])
    if not stage.done:
        history = [ws.load(stage_name(t)).metrics for t in numbers]
        scores = [row[f"validation_{criterion}"] for row in history]
        if any(score is None for score in scores):
            raise DataError("These validation prompts have no true utility: choose by 'reward'.")
        best = int(np.argmax([score["value"] for score in scores])) + 1
        choice = {"iteration": best, "criterion": criterion, "history": history}
        write_json(stage.dir / "choice.json", choice)
        stage.finish(choice)
    return stage.metrics


def check_slices(ws: Workspace, profile: Profile) -> dict[str, int]:
    """Check that no prompt serves two purposes; return the number of prompts of each slice.

    Covers the iterations' slices and the validation prompts. Raises DataError naming a prompt
    that occurs twice.
    """
    numbers = range(1, profile.online.iterations + 1)
    slices = {f"iteration {t}": load_slice(ws, t) for t in numbers}
    slices["validation"] = read_jsonl(ws.load("data").dir / "prompts_validation.jsonl")
    owner: dict[str, str] = {}
    for name, rows in slices.items():
        for row in rows:
            first = owner.setdefault(row["prompt_id"], name)
            if first != name:
                raise DataError(
                    f"Prompt {row['prompt_id']!r} is in {first} and in {name}; the slices must be "
                    "disjoint. Run the data notebook (01) again."
                )
    return {name: len(rows) for name, rows in slices.items()}
