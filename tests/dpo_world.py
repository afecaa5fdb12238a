"""Tiny preference pairs for the tests of DPO, and log-probabilities straight from the logits."""

import torch

SEED = 7
WORDS = ["red", "blue", "green", "a long list of many words", "yes", "no", "seven", "eight"]


def pair(index: int, **extra) -> dict:
    """A question with two different answers."""
    prompt = [{"role": "user", "content": f"Question {index}?"}]
    return {
        "prompt_id": f"p{index}",
        "chosen": [*prompt, {"role": "assistant", "content": f"{WORDS[index % 8]} is right"}],
        "rejected": [*prompt, {"role": "assistant", "content": f"{WORDS[(index + 3) % 8]} no"}],
        **extra,
    }


PAIRS = [pair(i) for i in range(8)]
NEW_PAIRS = [pair(i) for i in range(8, 16)]


def log_probs(model, rows, column) -> torch.Tensor:
    """Summed log-probability of each answer, one sequence at a time."""
    totals = []
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row[column]])
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        answer = range(len(row["prompt_ids"]) - 1, ids.shape[1] - 1)
        totals.append(sum(logs[i, ids[0, i + 1]] for i in answer))
    return torch.stack(totals)


def four_vectors(policy, reference, rows) -> list[torch.Tensor]:
    """Policy chosen and rejected, then reference chosen and rejected."""
    sides = ("chosen_ids", "rejected_ids")
    return [log_probs(model, rows, side) for model in (policy, reference) for side in sides]
