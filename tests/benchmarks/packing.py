"""What packing buys: useful tokens a second, packed against padded; how fast a million are planned.

    python tests/benchmarks/packing.py                               # SmolLM2-135M, some minutes
    python tests/benchmarks/packing.py --model random-tiny-llama     # seconds
    python tests/benchmarks/packing.py --json

Both runs hold the same conversations, drawn from `packing.long_tailed_lengths` (log-normal, median
64 tokens, spread 1.2, clipped to [8, 1024]), and train the same adapters through the course's own
trainer, forward and backward. Packed batches are one block of 1024 tokens; padded batches are
`--padded-batch` conversations in random order, padded to the longest of them. A token is useful
when it is no padding. The batches of both alternate, so that a busy machine slows both alike.
`fill` is that of ten thousand conversations, `fill_measured` that of the few blocks timed.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace

import numpy as np
import torch
from datasets import Dataset
from trl import pack_dataset

from rlhf_guide import packing, sft
from rlhf_guide.machine import keep_freed_memory
from rlhf_guide.models import choose_device, load_policy, load_tokenizer, resolve_model
from rlhf_guide.notebook import quieten
from rlhf_guide.profiles import load_profile

BLOCK = 1024


def plan_million(block: int = 8192) -> float:
    """Seconds for a best-fit-decreasing plan of one million conversations."""
    lengths = packing.long_tailed_lengths(1_000_000, block)
    started = time.perf_counter()
    packing.best_fit_decreasing(lengths, block)
    return time.perf_counter() - started


def corpus_fill(count: int = 10_000) -> float:
    """How full the trainer's packer gets the blocks of a whole corpus."""
    rows = [[0] * int(length) for length in packing.long_tailed_lengths(count, BLOCK)]
    return sft.fill_rate(pack_dataset(Dataset.from_dict({"input_ids": rows}), BLOCK, "bfd"), BLOCK)


def random_conversations(lengths: np.ndarray, vocabulary: int) -> Dataset:
    """Rows of random tokens of the given lengths, all learnt: words change no speed."""
    generator = np.random.default_rng(0)
    rows = [generator.integers(10, vocabulary, length).tolist() for length in lengths]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def make_trainer(base, dataset: Dataset, packed: bool, per_device: int):
    """The course's trainer on a fresh model, with adapters of rank 16."""
    _, dtype, _ = choose_device("auto")
    settings = replace(
        load_profile("cpu").sft,
        packing=packed,
        max_length=BLOCK,
        batch_size=per_device,
        per_device_batch_size=per_device,
    )
    model = load_policy(base, dtype).train()
    folder = tempfile.mkdtemp()
    return sft.build_trainer(model, load_tokenizer(base), dataset, settings, folder, 0, dtype)


def seconds_of(trainer, batch) -> float:
    """Time of one batch, forward and backward."""
    inputs = trainer._prepare_inputs(dict(batch))
    started = time.perf_counter()
    trainer.compute_loss(trainer.model, inputs).backward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(model: str, conversations: int, padded_batch: int) -> dict[str, float]:
    """Useful tokens a second of both, their ratio, and the share of useful tokens in a batch."""
    base = resolve_model(model)
    lengths = packing.long_tailed_lengths(conversations, BLOCK)
    dataset = random_conversations(lengths, len(load_tokenizer(base)))
    trainers = {
        "packed": make_trainer(base, dataset, True, 1),
        "padded": make_trainer(base, dataset, False, padded_batch),
    }
    batches = {name: list(trainer.get_train_dataloader()) for name, trainer in trainers.items()}
    for name, trainer in trainers.items():
        seconds_of(trainer, batches[name][0])  # warm-up
    spent = dict.fromkeys(trainers, 0.0)
    for turn in range(max(map(len, batches.values()))):
        for name, trainer in trainers.items():
            if turn < len(batches[name]):
                spent[name] += seconds_of(trainer, batches[name][turn])
    rate = {name: float(lengths.sum()) / seconds for name, seconds in spent.items()}
    room = sum(batch["input_ids"].numel() for batch in batches["padded"])
    return {
        "useful_tokens_ratio": rate["packed"] / rate["padded"],
        "packed_tokens_per_second": rate["packed"],
        "padded_tokens_per_second": rate["padded"],
        "padded_share_useful": float(lengths.sum() / room),
        "fill_measured": sft.fill_rate(trainers["packed"].train_dataset, BLOCK),
        "conversations": conversations,
        "tokens": int(lengths.sum()),
    }


def main() -> None:
    """Measure, and print a table or, with `--json`, one object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--conversations", type=int, default=72)
    parser.add_argument("--padded-batch", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    quieten()
    keep_freed_memory()  # as every notebook does
    found = measure(given.model, given.conversations, given.padded_batch)
    found["fill"] = corpus_fill()
    found["plan_million_seconds"] = plan_million()
    if given.json:
        print(json.dumps({"model": given.model, **found}))
    else:
        print("\n".join(f"{name:26} {value:10.3f}" for name, value in found.items()))


if __name__ == "__main__":
    main()
