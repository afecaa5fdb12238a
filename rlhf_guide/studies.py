"""Studies that take longer than a chapter may: run once, stored in the run folder, then shown.

    rlhf-guide study reward_data --run-dir runs/cpu --seeds 5

`reward_data`: which preference pairs should a reward model see? The authors' first data versions
differ in two choices, repeated here on the miniature: all pairs of a prompt's answers, or its best
answer against a random other one; with the safety prompts or without them. Every arm gets equally
many pairs, so that no arm wins by volume: four trainings a seed. A killed study goes on.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from data_prep import embedded
from rlhf_guide import oracle
from rlhf_guide.errors import MissingStage
from rlhf_guide.evaluation import bootstrap_mean, paired_difference
from rlhf_guide.files import append_jsonl, read_json, read_jsonl, write_json
from rlhf_guide.profiles import section_dict
from rlhf_guide.workspace import Stage, Workspace

Row = dict[str, Any]

STAGE = "reward_data"
RESULTS = Path(__file__).resolve().parent / "study_results"
PAIRS = 200  # of every arm; the smallest arm has 224
BASELINE = "all pairs"


def relabelled(pairs: Sequence[Row], prefer: Callable[[Row, Row, str], bool]) -> list[Row]:
    """The same pairs of answers with the votes of other annotators (`oracle.annotator`).

    Needs pairs of the miniature, whose scores are the true utilities.
    """
    rows = []
    for number, pair in enumerate(pairs):
        chosen, rejected = (_candidate(pair, side) for side in ("chosen", "rejected"))
        kept = prefer(chosen, rejected, f"{pair['prompt_id']}/{number}")
        rows.append(pair if kept else _swapped(pair))
    return rows


def reward_data_arms(pairs: Sequence[Row], count: int, seed: int) -> dict[str, list[Row]]:
    """`count` pairs for each arm, drawn from all pairs of the miniature's training prompts.

    Best against random takes one pair a prompt: the candidate of the largest utility and another
    one at random, with the vote that the annotator gave.
    """
    rng = random.Random(seed)
    arms = {BASELINE: list(pairs), "best against random": _best_against_random(pairs, rng)}
    arms |= {
        f"{name}, no safety": [row for row in rows if row["section"] != "safety"]
        for name, rows in arms.items()
    }
    return {name: rng.sample(rows, count) for name, rows in arms.items()}


def run_reward_data(ws: Workspace, seeds: int = 5, pairs: int = PAIRS) -> Stage:
    """Train and judge a reward model for each arm and seed, and finish with the intervals."""
    profile = ws.profile
    config = {
        **section_dict(profile.reward_model),
        "base": profile.reward_base_model,
        "seeds": seeds,
        "pairs": pairs,
        "bootstrap_samples": profile.evaluation.bootstrap_samples,
    }
    stage = ws.stage(STAGE, config)
    if stage.done:
        return stage
    file = stage.dir / "verdicts.jsonl"
    done = {(row["arm"], row["seed"]) for row in read_jsonl(file)} if file.exists() else set()
    heldout = _pairs("preference_heldout", 6)
    everything = _pairs("preference_train", None)
    for seed in range(seeds):
        for arm, rows in reward_data_arms(everything, pairs, seed).items():
            if (arm, seed) not in done:
                verdicts = _train_and_judge(ws, rows, heldout, seed)
                append_jsonl(file, [{"arm": arm, "seed": seed, "correct": verdicts}])
                print(f"{arm}, seed {seed}: {np.mean(verdicts):.3f}", flush=True)
    return stage.finish(_summary(read_jsonl(file), heldout, profile.evaluation.bootstrap_samples))


def _pairs(split: str, pairs_per_question: int | None) -> list[Row]:
    return embedded.build_pairs(
        split,
        lambda prompt, text, reason: oracle.utility(prompt, text, reason).total,
        oracle.annotator(),
        pairs_per_question,
    )[0]


def _candidate(pair: Row, side: str) -> Row:
    return {"text": pair[side][-1]["content"], "utility": pair[f"{side}_score"]}


def _swapped(pair: Row) -> Row:
    """The pair with the other answer chosen."""
    swapped = dict(pair)
    for part in ("", "_score", "_kind", "_finish_reason"):
        swapped[f"chosen{part}"] = pair[f"rejected{part}"]
        swapped[f"rejected{part}"] = pair[f"chosen{part}"]
    return swapped


def _best_against_random(pairs: Sequence[Row], rng: random.Random) -> list[Row]:
    by_prompt: dict[str, list[Row]] = {}
    for row in pairs:
        by_prompt.setdefault(row["prompt_id"], []).append(row)
    found = []
    for rows in by_prompt.values():
        best = max(_larger_score(row) for row in rows)
        found.append(rng.choice([row for row in rows if _larger_score(row) == best]))
    return found


def _larger_score(pair: Row) -> float:
    return max(pair["chosen_score"], pair["rejected_score"])


def _train_and_judge(
    ws: Workspace, pairs: Sequence[Row], heldout: Sequence[Row], seed: int
) -> list[float]:
    from rlhf_guide.models import choose_device, resolve_model
    from rlhf_guide.pair_accuracy import score_pairs
    from rlhf_guide.reward_model import RewardScorer, train_reward_model

    profile = ws.profile
    dtype = choose_device(profile.dtype)[1]
    settings = replace(profile.reward_model, max_samples=0)
    base = resolve_model(profile.reward_base_model, profile.allow_download)
    with TemporaryDirectory() as folder:
        train_reward_model(base, pairs, settings, folder, seed, dtype)
        scorer = RewardScorer(folder, dtype, settings.max_length)
        return [row["correct"] for row in score_pairs(scorer, heldout)]


def _summary(found: Sequence[Row], heldout: Sequence[Row], n_boot: int) -> Row:
    """By arm: accuracy, each seed's own, accuracy on safety prompts, and gain over all pairs.

    A pair's verdict is averaged over the seeds first; intervals redraw prompts.
    """
    prompts = [pair["prompt_id"] for pair in heldout]
    safety = [i for i, pair in enumerate(heldout) if pair["section"] == "safety"]
    safety_prompts = [prompts[i] for i in safety]
    runs: dict[str, list[list[float]]] = {}
    for row in found:
        runs.setdefault(row["arm"], []).append(row["correct"])
    means = {arm: np.mean(rows, axis=0) for arm, rows in runs.items()}
    return {
        arm: {
            "accuracy": bootstrap_mean(mean, prompts, n_boot),
            "accuracy_of_seeds": [float(np.mean(row)) for row in runs[arm]],
            "accuracy_safety": bootstrap_mean(mean[safety], safety_prompts, n_boot),
            "gain_over_all_pairs": paired_difference(mean, means[BASELINE], prompts, n_boot),
        }
        for arm, mean in means.items()
    }


def keep(stage: Stage) -> Path:
    """Write a finished study's result, with what produced it, where the book finds it."""
    parts = ("stage", "config", "versions", "device", "dtype", "finished_at", "metrics")
    file = RESULTS / f"{stage.name}.json"
    write_json(file, {part: stage.manifest[part] for part in parts})
    return file


def load_study(ws: Workspace, name: str) -> Row:
    """A study's result: the run folder's own, or the one that comes with the course.

    `metrics` are what was found, `config` and `versions` what produced it, `own` says which of the
    two it is. Raises MissingStage where there is neither.
    """
    try:
        return {**ws.load(name).manifest, "own": True}
    except MissingStage:
        file = RESULTS / f"{name}.json"
        if not file.exists():
            raise
        return {**read_json(file), "own": False}
