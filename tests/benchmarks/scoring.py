"""What batched scoring buys: pairs a second against one conversation at a time, and equal scores.

    python tests/benchmarks/scoring.py                               # SmolLM2-135M, some minutes
    python tests/benchmarks/scoring.py --model runs/cpu/reward_model/model
    python tests/benchmarks/scoring.py --json

Both score the chosen and the rejected answers of the miniature's held-out pairs in float32. One at
a time is transformers' text-classification pipeline: a forward pass for each answer of each pair,
padded to nothing but with nothing beside it. The course scores all answers at once: what
conversations begin with in common is read once, and a conversation that stands in several pairs (as
here: see `different_conversations`) is one. Rounds of both alternate, so that a busy machine slows
both alike. An embedded model's name gives its backbone a random head of the usual size: the speed
is that of a trained model.

`tokens_ratio` is the part of the gain that comes from reading less. The rest is that of long rows:
a short sequence leaves a part of two CPU cores idle, and nearly all of a GPU.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import pipeline

from data_prep import embedded
from rlhf_guide import oracle
from rlhf_guide.chat import encode_conversation
from rlhf_guide.embedded import NAMES
from rlhf_guide.machine import keep_freed_memory
from rlhf_guide.models import load_reward_model, load_tokenizer, resolve_model, save_model
from rlhf_guide.notebook import quieten
from rlhf_guide.reward_model import RewardScorer
from rlhf_guide.token_trees import tree_rows

ROUNDS = 4


def heldout_conversations(count: int) -> list[list[dict[str, str]]]:
    """Chosen and rejected conversations of the first `count` held-out pairs."""
    pairs, _ = embedded.build_pairs(
        "preference_heldout",
        lambda prompt, text, reason: oracle.utility(prompt, text, reason).total,
        oracle.annotator(),
    )
    return [pair[side] for pair in pairs[:count] for side in ("chosen", "rejected")]


def scorer_of(model: str, scratch: str) -> RewardScorer:
    """A saved reward model, or an embedded language model under a random head."""
    if model in NAMES:
        base = resolve_model(model)
        backbone = load_reward_model(base, torch.float32)
        seeded = torch.Generator().manual_seed(0)
        size = backbone.config.initializer_range
        torch.nn.init.normal_(backbone.score.weight, std=size, generator=seeded)
        save_model(backbone, load_tokenizer(base), scratch)
        model = scratch
    return RewardScorer(Path(model), torch.float32)


def pipeline_of(scorer: RewardScorer) -> Callable[[list[dict[str, str]]], float]:
    """transformers' pipeline: the reward of one conversation."""
    classify = pipeline(
        "text-classification",
        model=scorer.model,
        tokenizer=scorer.tokenizer,
        function_to_apply="none",
    )

    def score(talk: list[dict[str, str]]) -> float:
        ids = encode_conversation(scorer.tokenizer, talk)
        text = scorer.tokenizer.decode(ids)  # the template, without a line break at its end
        return classify(text)[0]["score"]

    return score


def measure(model: str, pairs: int) -> dict[str, float]:
    """Pairs a second of both ways, their ratio, and the largest difference of their scores."""
    talks = heldout_conversations(pairs)
    with tempfile.TemporaryDirectory() as scratch:
        scorer = scorer_of(model, scratch)
    scorer.score(talks[:2])  # warm-up
    alone = pipeline_of(scorer)
    alone(talks[0])
    spent, scores = {"batched": 0.0, "single": 0.0}, {}
    for _ in range(ROUNDS):
        for name in spent:
            started = time.perf_counter()
            if name == "batched":
                scores[name] = scorer.score(talks)
            else:
                scores[name] = np.array([alone(talk) for talk in talks])
            spent[name] += time.perf_counter() - started
    sequences = [encode_conversation(scorer.tokenizer, talk) for talk in talks]
    read = sum(len(row.tokens) for row in tree_rows(sequences))
    rate = {name: ROUNDS * len(talks) / 2 / seconds for name, seconds in spent.items()}
    return {
        "pairs_per_second_ratio": rate["batched"] / rate["single"],
        "max_abs_diff": float(np.abs(scores["batched"] - scores["single"]).max()),
        "pairs_per_second": rate["batched"],
        "pairs_per_second_one_at_a_time": rate["single"],
        "tokens_ratio": sum(map(len, sequences)) / read,
        "pairs": len(talks) // 2,
        "different_conversations": len(set(map(tuple, sequences))),
    }


def main() -> None:
    """Measure, and print a table or, with `--json`, one object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=NAMES[0], help="embedded model, or a reward model")
    parser.add_argument("--pairs", type=int, default=96)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    quieten()
    keep_freed_memory()  # as every notebook does
    found = measure(given.model, given.pairs)
    if given.json:
        model = given.model if given.model in NAMES else "trained"
        print(json.dumps({"model": model, "dtype": "float32", **found}))
    else:
        print("\n".join(f"{name:32} {value:10.5f}" for name, value in found.items()))


if __name__ == "__main__":
    main()
