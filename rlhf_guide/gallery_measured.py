"""The gallery's cases that train nothing: the run's tokens, losses and tables, the bandit."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.embedded import load_demonstrations
from rlhf_guide import detectors, theory, theory_online
from rlhf_guide.best_of_n import kl_bound
from rlhf_guide.chat import encode_completion, encode_conversation, encode_prompt, truncate_left
from rlhf_guide.evaluation_answers import other_tables, overlaps
from rlhf_guide.gallery_case import Case, Panel
from rlhf_guide.gallery_training import token_losses, trusted_pairs
from rlhf_guide.models import load_policy, load_tokenizer
from rlhf_guide.policies import sft_policy
from rlhf_guide.workspace import Workspace, read_jsonl

ANSWERS, BLOCK = 16, 4  # demonstrations read one by one, and packed in one block
WORLD = {"worlds": 10, "prompts": 8, "answers": 16, "dimension": 8, "eta": 1.0}
SMALL_BETA = 0.01
ROUNDS, QUERIES, DRAWN = 12, 16, 40
KL_BUDGET = float(kl_bound(WORLD["answers"]))  # as far as the best of 16 answers of π0 may go


def doubled_bos(ws: Workspace) -> Case:
    """Losses of demonstrations under π0, after a prompt with one BOS and with two."""
    model, tokenizer = _loaded(sft_policy(ws)[0])
    found, curves = [], []
    for extra in ([], [tokenizer.bos_token_id]):
        rows, losses = [], []
        for row in _table(ws, "sft")[:ANSWERS]:
            *prompt, answer = row["messages"]
            ids, completion = encode_completion(tokenizer, prompt, answer["content"])
            rows.append(extra + ids + completion)
            losses.append(float(token_losses(model, rows[-1])[-len(completion) :].mean()))
        curves.append(losses)
        found.append(detectors.doubled_bos(rows, tokenizer.bos_token_id))
    return Case((Panel("answer", "loss, nats a token", *curves),), *found)


def contaminated_packing(ws: Workspace) -> Case:
    """Losses under π0 in a packed block, with positions that restart and with some that run on."""
    model, tokenizer = _loaded(sft_policy(ws)[0])
    rows = [encode_conversation(tokenizer, row["messages"]) for row in _table(ws, "sft")[:BLOCK]]
    alone = [float(token_losses(model, row).mean()) for row in rows]
    restarting = [place for row in rows for place in range(len(row))]
    curves, found = [], []
    for positions in (restarting, list(range(len(restarting)))):
        packed = _packed_losses(model, rows, positions)
        curves.append([abs(a - b) for a, b in zip(packed, alone, strict=True)])
        found.append(detectors.contaminated_packing(packed, alone))
    return Case((Panel("place in the block", "change, nats a token", *curves),), *found)


@lru_cache(maxsize=1)  # two cases read the same π0
def _loaded(folder: Path) -> tuple[Any, Any]:
    return load_policy(folder, torch.float32), load_tokenizer(folder)


def _packed_losses(
    model: Any, rows: Sequence[Sequence[int]], positions: Sequence[int]
) -> list[float]:
    """Mean loss of each conversation in one block, its first token left out."""
    losses = token_losses(model, [token for row in rows for token in row], positions)
    starts = np.cumsum([0, *map(len, rows)])
    return [float(losses[start : end - 1].mean()) for start, end in pairwise(starts)]


def truncated_pairs(ws: Workspace) -> Case:
    """Cut pairs with a history on the left and on the right, to multiples of the median prompt."""
    tokenizer = load_tokenizer(sft_policy(ws)[0])
    pairs = _with_history(trusted_pairs(ws.profile.seed))
    prompt = float(np.median([len(encode_prompt(tokenizer, p["chosen"][:-1])) for p in pairs]))
    lengths = [round(part * prompt) for part in (0.5, 0.75, 1, 1.25, 1.5)]
    sides = [[encode_conversation(tokenizer, p[s]) for p in pairs] for s in ("chosen", "rejected")]
    every = [
        [detectors.truncated_pairs(*([cut(i, n) for i in side] for side in sides)) for n in lengths]
        for cut in (truncate_left, lambda ids, n: ids[:n])
    ]
    curves = [[finding.value for finding in row] for row in every]
    panel = Panel("tokens kept", "share of equal pairs", *curves, at=lengths)
    return Case((panel,), *(row[2] for row in every))


def _with_history(pairs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pairs as the end of longer conversations: two turns of the demonstrations come first."""
    turns = [row["messages"] for row in load_demonstrations()]
    histories = [first + second for first, second in pairwise(turns)]
    return [
        {side: histories[place % len(histories)] + pair[side] for side in ("chosen", "rejected")}
        for place, pair in enumerate(pairs)
    ]


def beta_too_small(ws: Workspace) -> Case:
    """The exact bandit's fitted rewards, tilted with a fitting and with a far smaller β."""
    bandit, run = _online(ws.profile.seed, "passive")
    base = bandit.log_base
    curves = [
        [
            float(theory.kl(theory.tilt(base, bandit.reward_of(theta), beta), base).mean())
            for theta in run.thetas[1:]
        ]
        for beta in (bandit.eta, SMALL_BETA)
    ]
    found = [detectors.beta_too_small(curve[-1], KL_BUDGET) for curve in curves]
    return Case((Panel("round", "KL(π ‖ π0), nats", *curves, limit=KL_BUDGET),), *found)


def moving_reference(ws: Workspace) -> Case:
    """Online learning in the exact bandit, tied to π0 or to the previous policy."""
    spent, found = [], []
    for moving in (False, True):
        bandit, run = _online(ws.profile.seed, "passive", moving_reference=moving)
        divergences = theory.kl(run.policies, bandit.log_base).mean(axis=1)[1:]
        gains = [
            float((theory.expected(p, r) - theory.expected(bandit.log_base, r)).mean())
            for p, r in zip(run.policies[1:], map(bandit.reward_of, run.thetas[1:]), strict=True)
        ]
        rounds = [
            detectors.moving_reference(float(d), gain, bandit.eta)
            for d, gain in zip(divergences, gains, strict=True)
        ]
        spent.append((divergences.tolist(), [finding.value for finding in rounds]))
        found.append(rounds[-1])
    divergence = Panel("round", "KL(π ‖ π0), nats", spent[0][0], spent[1][0])
    ratio = Panel("round", "β KL / gain in reward", spent[0][1], spent[1][1], limit=1.0)
    return Case((divergence, ratio), *found)


def stale_data(ws: Workspace) -> Case:
    """Rewards of the answers in each round's pairs against fresh ones, on-policy and from π0."""
    curves, found = [], []
    for explorer in ("passive", "offline"):
        bandit, run = _online(ws.profile.seed, explorer)
        rng = np.random.default_rng([ws.profile.seed, 2])
        rounds = []
        for policy, theta in zip(run.policies[1:-1], run.thetas[1:-1], strict=True):
            sampler = policy if explorer == "passive" else bandit.log_base
            reward = bandit.reward_of(theta)
            stored, fresh = (_drawn_rewards(p, reward, rng) for p in (sampler, policy))
            rounds.append(detectors.stale_data(stored, fresh))
        curves.append([finding.value for finding in rounds])
        found.append(rounds[-1])
    panel = Panel("update", "fresh − stored, std. errors", *curves, limit=found[0].limit)
    return Case((panel,), *found)


def _drawn_rewards(
    log_policy: np.ndarray, reward: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Rewards of `DRAWN` sampled answers of each world, each to a random prompt."""
    worlds, prompts = log_policy.shape[:2]
    world, prompt = np.arange(worlds)[:, None], rng.integers(prompts, size=(worlds, DRAWN))
    return reward[world, prompt, theory.draw(log_policy[world, prompt], rng)].ravel()


def _online(
    seed: int, explorer: str, moving_reference: bool = False
) -> tuple[theory.Bandit, theory_online.History]:
    """The exact bandit, and a run of Algorithm 1 in it."""
    bandit = theory.make_bandit(**WORLD, seed=seed)
    way = theory_online.EXPLORERS[explorer]
    run = theory_online.run_online(
        bandit, way, ROUNDS, QUERIES, seed, moving_reference=moving_reference
    )
    return bandit, run


def leaked_prompts(ws: Workspace) -> Case:
    """The run's own tables, and the same with more and more evaluation prompts in one of them."""
    prompts = _table(ws, "prompts_evaluation")
    tables = other_tables(ws)
    counts = [0, 1, 2, 4, 8]
    rows = [{"id": f"leak-{row['prompt_id']}", "messages": row["messages"]} for row in prompts]
    found = [
        detectors.leaked_prompts(
            overlaps(prompts, {**tables, "sft": [*tables["sft"], *rows[:count]]}), prompts
        )
        for count in counts
    ]
    values = [finding.value for finding in found]
    panel = Panel(
        "evaluation prompts put into the demonstrations",
        "share found",
        [values[0]] * len(counts),
        values,
        at=counts,
    )
    return Case((panel,), found[0], found[1])


def _table(ws: Workspace, name: str) -> list[dict]:
    return read_jsonl(ws.load("data").dir / f"{name}.jsonl")
