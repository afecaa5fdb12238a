"""The failure gallery (chapter 11): each failure broken on purpose beside a healthy twin.

A case is a function of the run's workspace that returns two curves and two findings of the same
detector. Cases are kept one by one in the stage `gallery`, so a killed run goes on where it was.
Training and tokens go through the course's own functions; only the one thing named is broken.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from rlhf_guide import detectors, dpo, policies, reward_model, sft, theory, theory_online
from rlhf_guide.best_of_n import kl_bound, mean_gain
from rlhf_guide.chat import encode_completion, encode_conversation, end_of_turn_id
from rlhf_guide.detectors import Finding
from rlhf_guide.evaluation_answers import other_tables, overlaps
from rlhf_guide.models import load_policy, load_tokenizer, resolve_model
from rlhf_guide.settings import Profile, section_dict
from rlhf_guide.workspace import Stage, Workspace, read_json, read_jsonl, write_json

Case = dict[str, Any]
WORLD = {"worlds": 10, "prompts": 8, "answers": 16, "dimension": 8, "rare_mass": 0.02}
BETA, SMALL_BETA = 0.25, 0.01
ROUNDS, BATCH = 12, 16
KL_BUDGET = float(kl_bound(16))  # nats: no further than the best of 16 could go
FIRM_BETA = 1.0  # near π0, where a moving reference's growth is not yet capped by few answers
DPO_PAIRS, REWARD_PAIRS, TURNS = 32, 32, 12
NEEDS_LANGUAGE_MODEL = ("swapped labels", "learning rate too high")
RATE_FACTOR = 100  # the broken learning rate, as a multiple of the recipe's


def open_stage(ws: Workspace) -> Stage:
    """The stage `gallery` of a run; notebook 11 finishes it."""
    config = {
        "cases": sorted(CASES),
        "world": WORLD,
        "beta": [BETA, SMALL_BETA, FIRM_BETA],
        "budget": KL_BUDGET,
        "rounds": [ROUNDS, BATCH],
        "rows": [DPO_PAIRS, REWARD_PAIRS, TURNS],
        "rate_factor": RATE_FACTOR,
        "seed": ws.profile.seed,
        "base_model": ws.profile.base_model,
        "reward_base_model": ws.profile.reward_base_model,
        "dpo": section_dict(ws.profile.dpo),
        "sft": section_dict(ws.profile.sft),
        "reward_model": section_dict(ws.profile.reward_model),
    }
    return ws.stage("gallery", config, ["data", "sft"])


def run_case(stage: Stage, name: str) -> Case:
    """A case by its name in `CASES`, from the stage's folder or run now.

    Returns `healthy` and `broken` (lists of numbers), `x` and `y` (axis labels with units; an
    empty `x` means one bar each), `findings` (`healthy` and `broken`, as dictionaries) and
    `chapter`, the notebook that explains it. Raises KeyError for an unknown name.
    """
    make, chapter = CASES[name]
    path = stage.dir / f"{make.__name__}.json"
    if not path.exists():
        write_json(path, {**make(stage.workspace), "chapter": chapter})
    return read_json(path)


def measurable(name: str, profile: Profile) -> bool:
    """Whether a profile's models can show a case: a random model learns too little for some."""
    return name not in NEEDS_LANGUAGE_MODEL or profile.base_model != "random-tiny-llama"


def index_row(name: str, case: Case) -> dict[str, Any]:
    """One row of the gallery's index."""
    healthy, broken = (case["findings"][side] for side in ("healthy", "broken"))
    return {
        "failure": name,
        "symptom": broken["diagnosis"],
        "healthy": healthy["value"],
        "broken": broken["value"],
        "threshold": broken["threshold"],
        "chapter": case["chapter"],
    }


def no_end_token(ws: Workspace) -> Case:
    """Fine-tune with and without the label of the end token, as when padding equals it."""
    base, tokenizer = _base(ws)
    end = end_of_turn_id(tokenizer)
    rows = list(sft.build_dataset(tokenizer, _table(ws, "sft")[:TURNS], ws.profile.sft)[0])
    masked = [
        {**row, "labels": [sft.IGNORED if t == end else t for t in row["labels"]]} for row in rows
    ]
    before = _end_loss(load_policy(base, torch.float32), rows)
    curves = [[before, _fine_tuned_end_loss(ws, base, kind, rows)] for kind in (rows, masked)]
    found = [detectors.no_end_token([r["labels"] for r in kind], end) for kind in (rows, masked)]
    return _case(curves, found, "0: before, 1: after training", "loss of the end token, nats")


def _fine_tuned_end_loss(
    ws: Workspace, base: Any, rows: Sequence[dict], tested: Sequence[dict]
) -> float:
    settings = replace(ws.profile.sft, packing=False, batch_size=1, per_device_batch_size=1)
    torch.manual_seed(ws.profile.seed)
    with TemporaryDirectory() as folder:
        trainer = sft.build_trainer(
            load_policy(base, torch.float32),
            load_tokenizer(base),
            Dataset.from_list(list(rows)),
            settings,
            folder,
            ws.profile.seed,
            torch.float32,
        )
        sft.show_progress(trainer, "fine-tuning")
        trainer.train()
    return _end_loss(trainer.model.eval(), tested)


@torch.no_grad()
def _end_loss(model: Any, rows: Sequence[dict]) -> float:
    """Mean −log p of the last token of each row, in nats."""
    losses = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]], device=model.device)
        logits = model(input_ids=ids).logits[0, -2].float()
        losses.append(-logits.log_softmax(-1)[ids[0, -1]].item())
    return float(np.mean(losses))


def doubled_bos(ws: Workspace) -> Case:
    """Loss of answers after a prompt with one BOS and with two."""
    base, tokenizer = _base(ws)
    model = load_policy(base, torch.float32)
    found, curves = [], []
    for extra in ([], [tokenizer.bos_token_id]):
        rows, losses = [], []
        for row in _table(ws, "sft")[:TURNS]:
            *prompt, answer = row["messages"]
            ids, completion = encode_completion(tokenizer, prompt, answer["content"])
            rows.append(extra + ids + completion)
            losses.append(_losses(model, rows[-1])[-len(completion) :].mean().item())
        curves.append(losses)
        found.append(detectors.doubled_bos(rows, tokenizer.bos_token_id))
    return _case(curves, found, "answer", "loss of the answer, nats a token")


def swapped_labels(ws: Workspace) -> Case:
    """Train a reward model on pairs as they are and turned round; score both on the true order."""
    pairs = _clear_pairs(ws, REWARD_PAIRS)
    turned = [{**p, "chosen": p["rejected"], "rejected": p["chosen"]} for p in pairs]
    curves, found = [], []
    for kind in (pairs, turned):
        with TemporaryDirectory() as folder:
            history = _train_reward_model(ws, kind, folder)
            scorer = reward_model.RewardScorer(
                folder, max_length=ws.profile.reward_model.max_length
            )
        curves.append([row["loss"] for row in history])
        better, worse = (scorer.score([p[side] for p in pairs]) for side in ("chosen", "rejected"))
        found.append(detectors.swapped_labels(list(better), list(worse)))
    return _case(curves, found, "step", "training loss, nats")


def _train_reward_model(ws: Workspace, pairs: Sequence[dict], folder: Any) -> list[dict]:
    base = resolve_model(ws.profile.reward_base_model, ws.profile.allow_download)
    settings = replace(
        ws.profile.reward_model, batch_size=4, per_device_batch_size=4, max_samples=0
    )
    return reward_model.train_reward_model(base, pairs, settings, folder, ws.profile.seed)[
        "history"
    ]


def truncated_pairs(ws: Workspace) -> Case:
    """Keep the last or the first tokens of each pair, at several lengths."""
    tokenizer = _base(ws)[1]
    pairs = _table(ws, "preference_train")[:200]
    sides = [[encode_conversation(tokenizer, p[s]) for p in pairs] for s in ("chosen", "rejected")]
    lengths = (16, 24, 32, 48, 64)
    cuts = (lambda ids, n: ids[-n:], lambda ids, n: ids[:n])
    every = [
        [detectors.truncated_pairs(*([cut(i, n) for i in side] for side in sides)) for n in lengths]
        for cut in cuts
    ]
    curves = [[finding.value for finding in row] for row in every]
    middle = len(lengths) // 2
    case = _case(curves, [row[middle] for row in every], "tokens kept", "share of equal pairs")
    return {**case, "at": list(lengths)}


def contaminated_packing(ws: Workspace) -> Case:
    """Losses in a packed block, with positions that restart and with positions that run on."""
    base, tokenizer = _base(ws)
    model = load_policy(base, torch.float32)
    rows = [encode_conversation(tokenizer, r["messages"]) for r in _table(ws, "sft")[:4]]
    alone = [_losses(model, row).mean().item() for row in rows]
    restarting = [place for row in rows for place in range(len(row))]
    curves, found = [], []
    for positions in (restarting, list(range(len(restarting)))):
        packed = _packed_losses(model, rows, positions)
        curves.append([abs(a - b) for a, b in zip(packed, alone, strict=True)])
        found.append(detectors.contaminated_packing(packed, alone))
    return _case(curves, found, "conversation in the block", "change of its loss, nats a token")


def _packed_losses(
    model: Any, rows: Sequence[Sequence[int]], positions: Sequence[int]
) -> list[float]:
    """Mean loss of each conversation in one block, its first token left out."""
    losses = _losses(model, [token for row in rows for token in row], positions)
    starts = np.cumsum([0, *map(len, rows)])
    return [losses[a : b - 1].mean().item() for a, b in pairwise(starts)]


@torch.no_grad()
def _losses(model: Any, ids: Sequence[int], positions: Sequence[int] | None = None) -> torch.Tensor:
    """−log p of every token after the first, in nats, shape (tokens − 1,)."""
    tokens = torch.tensor([ids], device=model.device)
    place = None if positions is None else torch.tensor([positions], device=model.device)
    logits = model(input_ids=tokens, position_ids=place, use_cache=False).logits[0, :-1].float()
    return -logits.log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]


def beta_too_small(ws: Workspace) -> Case:
    """Algorithm 1's fitted rewards, tilted with a proper and a far too small β (exact bandit)."""
    bandit = _bandit(ws)
    run = _run(ws, bandit, "passive")
    base = bandit.log_base
    rewards = [bandit.reward_of(theta) for theta in run.thetas[1:]]
    tilted = [[theory.tilt(base, reward, eta) for reward in rewards] for eta in (BETA, SMALL_BETA)]
    curves = [[float(theory.kl(p, base).mean()) for p in row] for row in tilted]
    found = [detectors.beta_too_small(row, KL_BUDGET) for row in curves]
    return _case(curves, found, "round", "KL(π ‖ π0), nats")


def learning_rate_too_high(ws: Workspace) -> Case:
    """DPO with the recipe's learning rate and with a hundred times it."""
    reference = policies.sft_policy(ws)[0]
    pairs = _clear_pairs(ws, DPO_PAIRS)
    curves = []
    for factor in (1, RATE_FACTOR):
        rate = min(0.5, factor * ws.profile.dpo.learning_rate)
        settings = replace(
            ws.profile.dpo, learning_rate=rate, batch_size=4, per_device_batch_size=4, epochs=1
        )
        with TemporaryDirectory() as folder:
            result = dpo.train_dpo(
                reference, pairs, settings, folder, ws.profile.seed, torch.float32
            )
        curves.append([row["loss"] for row in result["history"]])
    found = [detectors.learning_rate_too_high(losses) for losses in curves]
    return _case(curves, found, "step", "DPO loss, nats")


def moving_reference(ws: Workspace) -> Case:
    """Online learning against π0 and against the previous policy (exact bandit)."""
    bandit = replace(_bandit(ws), eta=FIRM_BETA)
    runs = [_run(ws, bandit, "best against worst", moving_reference=m) for m in (False, True)]
    curves = [theory.kl(run.policies, bandit.log_base).mean(axis=1).tolist() for run in runs]
    found = [detectors.moving_reference(row) for row in curves]
    return _case(curves, found, "round", "KL(π ‖ π0), nats")


def length_hack(ws: Workspace) -> Case:
    """Best-of-n by a slightly noisy reward and by one that pays for words."""
    utilities, words = _answers(ws)
    rng = np.random.default_rng([ws.profile.seed, 1])
    fair = [u + rng.normal(0, 0.2, len(u)) for u in utilities]
    paid = [u + w / 10 for u, w in zip(fair, words, strict=True)]
    curves = [_best_of(rewards, words) for rewards in (fair, paid)]
    found = [detectors.length_hack(rewards, words) for rewards in (fair, paid)]
    return _case(curves, found, "n − 1", "words gained by the best of n")


def noisy_reward_model(ws: Workspace) -> Case:
    """Best-of-n by a reward with little noise and by one that is mostly noise."""
    utilities, _ = _answers(ws)
    rng = np.random.default_rng([ws.profile.seed, 2])
    noisy = [[u + rng.normal(0, sd, len(u)) for u in utilities] for sd in (0.2, 3.0)]
    curves = [_best_of(rewards, utilities) for rewards in noisy]
    found = [detectors.noisy_reward_model(rewards, utilities) for rewards in noisy]
    return _case(curves, found, "n − 1", "true utility gained by the best of n")


def stale_data(ws: Workspace) -> Case:
    """KL of each round's policy from the sampler of its pairs: the last policy, or always π0."""
    bandit = _bandit(ws)
    fresh, stale = (_run(ws, bandit, name).policies for name in ("passive", "offline"))
    samplers = (fresh[1:-1], np.broadcast_to(stale[0], stale[2:].shape))
    curves = [
        theory.kl(after, before).mean(axis=1).tolist()
        for after, before in zip((fresh[2:], stale[2:]), samplers, strict=True)
    ]
    found = [detectors.stale_data(row) for row in curves]
    return _case(curves, found, "round − 1", "KL(policy ‖ sampler), nats")


def leaked_prompts(ws: Workspace) -> Case:
    """The run's own tables, then with every tenth evaluation prompt among the demonstrations."""
    prompts = _table(ws, "prompts_evaluation")
    tables = other_tables(ws)
    leak = [
        {"id": f"leak-{row['prompt_id']}", "messages": row["messages"]} for row in prompts[::10]
    ]
    both = (tables, {**tables, "sft": [*tables["sft"], *leak]})
    found = [detectors.leaked_prompts(overlaps(prompts, kind), prompts) for kind in both]
    curves = [[finding.value] for finding in found]
    return _case(curves, found, "", "share of evaluation prompts seen")


def _case(curves: Sequence[Sequence[float]], findings: Sequence[Finding], x: str, y: str) -> Case:
    return {
        "healthy": [float(value) for value in curves[0]],
        "broken": [float(value) for value in curves[1]],
        "x": x,
        "y": y,
        "findings": dict(zip(("healthy", "broken"), map(asdict, findings), strict=True)),
    }


def _base(ws: Workspace) -> tuple[Any, Any]:
    """Folder of the base model, and its tokenizer."""
    base = resolve_model(ws.profile.base_model, ws.profile.allow_download)
    return base, load_tokenizer(base)


def _table(ws: Workspace, name: str) -> list[dict]:
    return read_jsonl(ws.load("data").dir / f"{name}.jsonl")


def _clear_pairs(ws: Workspace, count: int) -> list[dict]:
    """The pairs whose scores differ most: nobody doubts their order."""
    pairs = _table(ws, "preference_train")
    return sorted(pairs, key=lambda p: p["rejected_score"] - p["chosen_score"])[:count]


def _answers(ws: Workspace) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """True utility and words of the distinct answers to each prompt that has four or more."""
    found: dict[str, dict[str, float]] = {}
    for pair in _table(ws, "preference_train"):
        for side in ("chosen", "rejected"):
            text = pair[side][-1]["content"]
            found.setdefault(pair["prompt_id"], {})[text] = pair[f"{side}_score"]
    groups = [group for group in found.values() if len(group) >= 4]
    words = [np.array([len(text.split()) for text in group]) for group in groups]
    return [np.array(list(group.values())) for group in groups], words


def _best_of(rewards: Sequence[np.ndarray], values: Sequence[np.ndarray]) -> list[float]:
    return mean_gain(rewards, values, max_n=4, n_boot=10)["value"].tolist()


def _bandit(ws: Workspace) -> theory.Bandit:
    return theory.make_bandit(**WORLD, eta=BETA, seed=ws.profile.seed)


def _run(ws: Workspace, bandit: theory.Bandit, name: str, **options: Any) -> theory_online.History:
    explorer = theory_online.EXPLORERS[name]
    return theory_online.run_online(bandit, explorer, ROUNDS, BATCH, ws.profile.seed, **options)


CASES: dict[str, tuple[Callable[[Workspace], Case], str]] = {
    "no end token": (no_end_token, "02_sft_with_packing"),
    "doubled BOS": (doubled_bos, "02_sft_with_packing"),
    "swapped labels": (swapped_labels, "03_reward_model"),
    "truncated pairs": (truncated_pairs, "03_reward_model"),
    "contaminated packing": (contaminated_packing, "02_sft_with_packing"),
    "β too small": (beta_too_small, "06_offline_dpo"),
    "learning rate too high": (learning_rate_too_high, "06_offline_dpo"),
    "moving reference": (moving_reference, "09_theory"),
    "length hack": (length_hack, "05_what_rewards_measure"),
    "noisy reward model": (noisy_reward_model, "05_what_rewards_measure"),
    "stale data": (stale_data, "07_online_dpo"),
    "leaked evaluation prompts": (leaked_prompts, "08_evaluation"),
}
