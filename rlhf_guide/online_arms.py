"""What matters in an online iteration: one choice changed at a time, over several seeds.

    rlhf-guide study online_arms --run-dir runs/cpu --seeds 3

Every arm is one iteration of Algorithm 2 from the same SFT policy on the same prompts; within a
seed all arms share the drawn answers, so an arm with two answers a prompt uses two of the eight.
Two more arms continue the first with a second iteration, once against the SFT policy and once
against the previous policy as reference. All are judged by the true utility on prompts that no
arm has seen: the third slice and the validation prompts, never the evaluation prompts, so that
the result may be used to choose settings. A killed study goes on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from rlhf_guide import oracle
from rlhf_guide.annotation import annotate
from rlhf_guide.batching import sample_rows
from rlhf_guide.dpo import train_dpo
from rlhf_guide.errors import DataError, ParameterError
from rlhf_guide.evaluation import (
    bootstrap_mean,
    judge,
    knows_truth,
    paired_difference,
)
from rlhf_guide.files import append_jsonl, read_jsonl
from rlhf_guide.generation import answer_config, generate
from rlhf_guide.models import (
    choose_device,
    load_policy,
    load_tokenizer,
    resolve_model,
    save_model,
)
from rlhf_guide.online_stages import (
    REWARDS,
    iteration_prompts,
    load_slice,
    mixed_temperatures,
    stage_name,
    with_reference,
)
from rlhf_guide.policies import Policy, model_folder, policy_location, sft_policy
from rlhf_guide.profiles import Profile, section_dict
from rlhf_guide.reward_model import RewardScorer, train_reward_model
from rlhf_guide.selection import build_pairs
from rlhf_guide.studies import relabelled
from rlhf_guide.workspace import Stage, Workspace

Row = dict[str, Any]

STAGE = "online_arms"
PROMPTS = 48  # of a slice, so pairs of an arm and iteration
ANSWERS = 2  # to each of the prompts that judge an arm
VERBOSE_PAIRS = 300  # that train the reward model of the verbose annotators
VERBOSITY_BIAS = 2.0  # of those annotators, as in chapter 05
START, BASE, SECOND = "SFT policy", "course's choices", "second iteration, SFT reference"


@dataclass(frozen=True)
class Arm:
    """What one arm does otherwise than `BASE`; `against` is the arm that it is compared with."""

    dpo: Mapping[str, Any] = field(default_factory=dict)
    answers: int = 0  # of those drawn; 0 is all of them
    strategy: str = "best_worst"
    length_penalty: float = 0.0
    rewards: str = "course"
    against: str = BASE


ARMS = {
    BASE: Arm(against=START),
    "4 answers a prompt": Arm(answers=4),
    "2 answers a prompt": Arm(answers=2),
    "best against second": Arm(strategy="best_second"),
    "best against random": Arm(strategy="best_random"),
    "random pair": Arm(strategy="random"),
    "length penalty 0.003": Arm(length_penalty=0.003),
    "verbose reward model": Arm(rewards="verbose"),
    "NLL term 0.2": Arm(dpo={"nll_weight": 0.2}),
    # A tenth of what the loss pulls at an answer with at first, β/2.
    "optimistic term 0.005": Arm(dpo={"optimism_weight": 0.005}),
}
STORED = "stored pairs (offline)"
MOVING = "second iteration, moving reference"
AGAINST = {name: arm.against for name, arm in ARMS.items()}
AGAINST |= {STORED: BASE, SECOND: BASE, MOVING: SECOND}


def run_arms(ws: Workspace, seeds: int = 3, prompts: int = PROMPTS) -> Stage:
    """Train and judge every arm with every seed, store the rows, finish with the intervals.

    Raises DataError for real data, whose true utility nobody knows.
    """
    profile = ws.profile
    require_truth(unseen(ws))
    config = {
        **section_dict(profile.dpo),
        **answer_config(profile.generation),
        "temperatures": mixed_temperatures(profile.online),
        "prompts": min(prompts, profile.online.prompts_per_iteration),
        "answers": ANSWERS,
        "verbose_pairs": VERBOSE_PAIRS,
        "verbosity_bias": VERBOSITY_BIAS,
        "verbose_reward_model": section_dict(profile.reward_model),
        "temperature": profile.evaluation.temperature,
        "arms": {name: asdict(arm) for name, arm in ARMS.items()},
        "seed": profile.seed,
        "seeds": seeds,
    }
    stage = ws.stage(STAGE, config, ["data", "sft", "reward_model"])
    if not stage.done:
        study = _Study(stage)
        for seed in range(profile.seed, profile.seed + seeds):
            study.run_seed(seed)
        stage.finish(summary(study.rows(), profile.evaluation.bootstrap_samples))
    return stage


class _Study:
    """One run of the study: what all arms share, and the file of what was found."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.ws, self.profile = stage, stage.workspace, stage.workspace.profile
        self.dtype = choose_device(self.profile.dtype)[1]
        self.reference = sft_policy(self.ws)[0]
        # Stored pairs and a second iteration have no answers of the reference beside them.
        self.dpo = replace(self.profile.dpo, optimism_weight=0.0)
        self.judged = unseen(self.ws)
        self.stored = read_jsonl(self.ws.load("data").dir / "preference_train.jsonl")

    def rows(self) -> list[Row]:
        file = self.stage.dir / "utilities.jsonl"
        return read_jsonl(file) if file.exists() else []

    def run_seed(self, seed: int) -> None:
        folder = self.stage.dir / f"seed_{seed}"
        done = {row["arm"] for row in self.rows() if row["seed"] == seed}
        todo = [name for name in (START, STORED, *ARMS, SECOND, MOVING) if name not in done]
        if not todo:
            return
        drawn = self._drawn(folder, seed, 1, (self.reference, None), ("course", "verbose"))
        for name in todo:
            print(f"seed {seed}: {name}", flush=True)
            if name == START:
                self._judge(name, seed, (self.reference, None), {})
            elif name in (SECOND, MOVING):
                self._second(name, seed, folder)
            elif name == STORED:
                pairs = sample_rows(self.stored, self.stage.config["prompts"], seed)
                self._train(name, seed, pairs, self.dpo)
            else:
                arm = ARMS[name]
                pairs = arm_pairs(drawn[arm.rewards], arm, seed)
                settings = replace(self.dpo, **arm.dpo)
                self._train(name, seed, pairs, settings, folder if name == BASE else None)

    def _drawn(
        self, folder: Path, seed: int, t: int, policy: Policy, scorers: Sequence[str]
    ) -> dict[str, list[Row]]:
        """The answers to slice t, scored by each reward model."""
        folder.mkdir(parents=True, exist_ok=True)
        rows = generate(
            policy[0],
            self._prompts(t, seed),
            self.profile.generation,
            self.stage.config["temperatures"],
            seed + t,
            folder / f"generations_{t}.jsonl",
            self.dtype,
            adapter=policy[1],
        )
        return {
            name: annotate(rows, self._scorer(name), folder / f"annotated_{t}_{name}.jsonl")
            for name in scorers
        }

    def _prompts(self, t: int, seed: int) -> list[Row]:
        """Some of the prompts that the run itself answers in iteration t."""
        rows = iteration_prompts(self.ws, t, self.profile)
        return sample_rows(rows, self.stage.config["prompts"], seed)

    def _scorer(self, name: str) -> RewardScorer:
        folder = self.stage.dir / "verbose_reward_model"
        if name == "course":
            folder = model_folder(self.ws.load("reward_model"))
        elif not (folder / "tokenizer_config.json").exists():  # what is saved last
            self._train_verbose(folder)
        return RewardScorer(folder, self.dtype, self.profile.reward_model.max_length)

    def _train_verbose(self, folder: Path) -> None:
        profile = self.profile
        votes = oracle.annotator(profile.seed, verbosity_bias=VERBOSITY_BIAS)
        settings = replace(profile.reward_model, max_samples=VERBOSE_PAIRS)
        base = resolve_model(profile.reward_base_model, profile.allow_download)
        pairs = relabelled(self.stored, votes)
        train_reward_model(base, pairs, settings, folder, profile.seed, self.dtype)

    def _train(
        self,
        name: str,
        seed: int,
        pairs: Sequence[Row],
        settings: Any,
        keep_in: Path | None = None,
        start: Path | None = None,
        reference: Path | None = None,
    ) -> None:
        reference = reference or self.reference
        with TemporaryDirectory() as scratch:
            folder = Path(keep_in or scratch) / "policy"
            found = train_dpo(
                reference, pairs, settings, folder, seed, self.dtype, initial_adapter=start
            )
            self._judge(name, seed, policy_location(reference, folder), found["metrics"])

    def _second(self, name: str, seed: int, folder: Path) -> None:
        """A second iteration from the policy of `BASE`."""
        first = folder / "policy"
        drawn = self._drawn(folder, seed, 2, policy_location(self.reference, first), ("course",))
        pairs = arm_pairs(drawn["course"], ARMS[BASE], seed)
        if name == SECOND:
            self._train(name, seed, pairs, self.dpo, start=first)
            return
        merged = folder / "previous"
        model = load_policy(self.reference, torch.float32, first)
        save_model(model, load_tokenizer(self.reference), merged)
        self._train(name, seed, pairs, self.dpo, reference=merged)

    def _judge(self, name: str, seed: int, policy: Policy, trained: Mapping[str, Any]) -> None:
        utilities, characters = judge_policy(policy, self.judged, ANSWERS, seed, self.profile)
        row = {"arm": name, "seed": seed, "utility": utilities, "characters": characters}
        wanted = ("pairs", "end_margin", "end_chosen_log_ratio")
        row |= {key: trained[key] for key in wanted if key in trained}
        append_jsonl(self.stage.dir / "utilities.jsonl", [row])


def arm_pairs(annotated: Sequence[Row], arm: Arm, seed: int) -> list[Row]:
    """The pairs that an arm makes of the drawn answers, half of each temperature.

    For the optimistic term a pair has the first answer beside it: the policy that draws is the
    reference, and the first answers are drawn at its own temperature, 1.
    """
    rows = [_first_answers(row, arm.answers) for row in annotated]
    pairs = build_pairs(rows, arm.strategy, arm.length_penalty, seed)[0]
    return with_reference(pairs, rows) if arm.dpo.get("optimism_weight") else pairs


def _first_answers(row: Row, count: int) -> Row:
    total = len(row["responses"])
    if not count or count >= total:
        return row
    half = count // 2
    at = [*range(half), *range(total // 2, total // 2 + half)]
    return {**row, **{key: [row[key][i] for i in at] for key in ("responses", "rewards")}}


def judge_policy(
    policy: Policy, prompts: Sequence[Row], answers: int, seed: int, profile: Profile
) -> tuple[list[float], float]:
    """Mean true utility of each prompt's answers, and the mean length of an answer in characters.

    Needs prompts of the miniature, which know what a good answer is.
    """
    with TemporaryDirectory() as scratch:
        rows = generate(
            policy[0],
            prompts,
            profile.generation,
            [profile.evaluation.temperature] * answers,
            seed,
            Path(scratch) / "generations.jsonl",
            choose_device(profile.dtype)[1],
            adapter=policy[1],
            progress=False,
        )
    return true_utilities(rows)


def true_utilities(rows: Sequence[Row]) -> tuple[list[float], float]:
    """Mean utility of each row's answers, and the mean length of an answer in characters."""
    by_prompt: dict[str, list[float]] = {}
    answers = judge(rows)
    for answer in answers:
        by_prompt.setdefault(answer["prompt_id"], []).append(answer["utility"])
    utilities = [float(np.mean(values)) for values in by_prompt.values()]
    return utilities, float(np.mean([answer["characters"] for answer in answers]))


def require_truth(prompts: Sequence[Row]) -> None:
    """Raise DataError where the prompts do not know what a good answer is: on real data."""
    if not knows_truth(prompts):
        raise DataError(
            "this study measures the true utility, which only the embedded prompts have: run it on "
            "a run folder made with data_source=embedded."
        )


def repeat_arm(ws: Workspace, name: str, prompts: int = PROMPTS) -> Row:
    """Train and judge one arm of `ARMS` once more, with the run's own seed.

    It takes the answers of the run's first iteration, which are those of the study's first seed but
    for rounding: prompt, seed and policy are the same. Returns a row as `summary` takes it. Raises
    ParameterError for an unknown arm and one that scores anew, MissingStage before that iteration.
    """
    profile = ws.profile
    known = [arm for arm, what in ARMS.items() if what.rewards == "course"]
    if name not in known:
        raise ParameterError(f"unknown arm {name!r}; the arms are {', '.join(known)}.")
    wanted = min(prompts, profile.online.prompts_per_iteration)
    slice_of_run = iteration_prompts(ws, 1, profile)
    chosen = {row["prompt_id"] for row in sample_rows(slice_of_run, wanted, profile.seed)}
    stored = read_jsonl(ws.load(stage_name(1, "annotation")).dir / REWARDS)
    pairs = arm_pairs(
        [row for row in stored if row["prompt_id"] in chosen], ARMS[name], profile.seed
    )
    settings = replace(profile.dpo, **{"optimism_weight": 0.0, **ARMS[name].dpo})
    reference, dtype = sft_policy(ws)[0], choose_device(profile.dtype)[1]
    with TemporaryDirectory() as folder:
        found = train_dpo(reference, pairs, settings, folder, profile.seed, dtype)
        policy = policy_location(reference, folder)
        utilities, characters = judge_policy(policy, unseen(ws), ANSWERS, profile.seed, profile)
    row = {"arm": name, "seed": profile.seed, "utility": utilities, "characters": characters}
    return row | {"pairs": found["metrics"]["pairs"], "history": found["history"]}


def unseen(ws: Workspace) -> list[Row]:
    """The prompts that judge the arms: the third slice and the validation prompts."""
    validation = read_jsonl(ws.load("data").dir / "prompts_validation.jsonl")
    return load_slice(ws, 3) + validation


def summary(rows: Sequence[Row], n_boot: int) -> dict[str, Row]:
    """By arm: utility and gain over `AGAINST`, each with its interval, and each seed's gain.

    A prompt's utility is averaged over the seeds first; the interval redraws prompts.
    """
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        found.setdefault(row["arm"], {})[row["seed"]] = row
    table = {}
    for name, runs in found.items():
        values = np.array([run["utility"] for run in runs.values()])
        table[name] = {
            "utility": bootstrap_mean(values.mean(axis=0), n_boot=n_boot),
            "characters": float(np.mean([run["characters"] for run in runs.values()])),
            "seeds": len(runs),
        }
        if name in AGAINST:
            others = np.array([found[AGAINST[name]][seed]["utility"] for seed in runs])
            table[name] |= {
                "utility_of_seeds": values.mean(axis=1).tolist(),
                "against": AGAINST[name],
                "gain": paired_difference(values.mean(axis=0), others.mean(axis=0), n_boot=n_boot),
                "gain_of_seeds": (values - others).mean(axis=1).tolist(),
                "pairs": float(np.mean([run["pairs"] for run in runs.values()])),
            }
    return table
