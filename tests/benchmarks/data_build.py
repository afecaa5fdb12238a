"""How fast raw rows become `mix2`, and how fast 180,000 prompts are de-duplicated.

    python tests/benchmarks/data_build.py               # 850,000 rows, 180,000 prompts
    python tests/benchmarks/data_build.py --rows 5000 --prompts 2000
    python tests/benchmarks/data_build.py --json

The rows are synthetic, in the upstream schemas, as many of each set as it has raw (of SHP its train
split), with texts as long as Table 5 says on average. Their making is not timed. One prompt in ten
is an altered copy of another. Targets on two cores: 10 min and 6 GiB for the rows, 5 min for the
prompts.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from data_prep.build import build
from data_prep.dedup import deduplicate
from rlhf_guide.machine import peak_memory

RAW_ROWS = {
    "hh_rlhf": 115_547,
    "shp": 348_718,
    "helpsteer": 35_331,
    "pku_saferlhf": 26_874,
    "ultrafeedback": 63_967,
    "ultrainteract": 219_522,
    "codeultrafeedback": 10_000,
    "argilla_math": 2_418,
    "orca": 12_859,
    "capybara": 14_811,
}
ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
WORKERS = 2
CHARACTERS_A_TOKEN = 4


class Writer:
    """Texts cut from one long string of random words: quick to make, hardly ever equal."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        letters = "abcdefghijklmnopqrstuvwxyz"
        words = ["".join(self.rng.choices(letters, k=self.rng.randint(2, 9))) for _ in range(5000)]
        self.words = " ".join(self.rng.choices(words, k=200_000))

    def text(self, tokens: float) -> str:
        """A text of about so many tokens, its length drawn from an exponential distribution."""
        length = min(20_000, 20 + int(self.rng.expovariate(1 / tokens) * CHARACTERS_A_TOKEN))
        start = self.rng.randrange(len(self.words) - length)
        return self.words[start : start + length].strip()

    def rating(self) -> int:
        """A rating from 1 to 5."""
        return self.rng.randint(1, 5)


def hh_rlhf(write: Writer, i: int) -> dict[str, Any]:
    history = (
        f"\n\nHuman: {write.text(60)}\n\nAssistant: {write.text(40)}\n\nHuman: {write.text(60)}"
    )
    return {
        side: f"{history}\n\nAssistant: {write.text(tokens)}"
        for side, tokens in (("chosen", 82), ("rejected", 74))
    }


def shp(write: Writer, i: int) -> dict[str, Any]:
    votes = write.rng.randint(1, 200), write.rng.randint(1, 60)
    return {
        "history": f"Post {i // 11}. {write.words[i // 11 : i // 11 + 740]}",
        "human_ref_A": write.text(174),
        "human_ref_B": write.text(89),
        "score_A": votes[0],
        "score_B": votes[1],
        "labels": int(votes[0] > votes[1]),
    }


def helpsteer(write: Writer, i: int) -> dict[str, Any]:
    names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    prompt = f"{i // 4} {write.words[i // 4 : i // 4 + 2100]}"
    return {"prompt": prompt, "response": write.text(103)} | {n: write.rating() - 1 for n in names}


def pku_saferlhf(write: Writer, i: int) -> dict[str, Any]:
    safer = write.rng.randint(0, 1)
    return {
        "prompt": write.text(22),
        "response_0": write.text(72),
        "response_1": write.text(72),
        "is_response_0_safe": safer == 0,
        "is_response_1_safe": safer == 1,
        "better_response_id": write.rng.randint(0, 1),
        "safer_response_id": safer,
    }


def ultrafeedback(write: Writer, i: int) -> dict[str, Any]:
    def completion(model: int) -> dict[str, Any]:
        rated = {a: {"Rating": str(write.rating()), "Rationale": write.text(40)} for a in ASPECTS}
        return {
            "model": f"model-{model}",
            "response": write.text(245),
            "annotations": rated,
            "overall_score": float(write.rating()),
            "fine-grained_score": float(write.rating()),
            "critique": write.text(120),
        }

    return {"instruction": write.text(161), "completions": [completion(m) for m in range(4)]}


def ultrainteract(write: Writer, i: int) -> dict[str, Any]:
    turns = [("user", 250), ("assistant", 150), ("user", 100)]
    return {
        "task": "Math_CoT",
        "dataset": "synthetic",
        "trajectory": [{"from": name, "value": write.text(size)} for name, size in turns],
        "chosen": write.text(397),
        "rejected": write.text(417),
        "id": str(i),
        "parent_id": str(i),
    }


def codeultrafeedback(write: Writer, i: int) -> dict[str, Any]:
    models = [f"model-{m}" for m in range(4)]
    return {
        "instruction": write.text(173),
        "preference": "style",
        "models": models,
        "responses": [{"model": m, "response": write.text(414)} for m in models],
        "annotations": [
            {"model": m, "rating": str(write.rating()), "rationale": write.text(60)} for m in models
        ],
    }


def argilla_math(write: Writer, i: int) -> dict[str, Any]:
    return {
        "instruction": write.text(37),
        "chosen_response": write.text(277),
        "chosen_rating": 5.0,
        "rejected_response": write.text(265),
        "rejected_rating": 4.0,
    }


def orca(write: Writer, i: int) -> dict[str, Any]:
    answers = [write.text(165), write.text(261)]
    return {
        "system": write.text(30),
        "input": write.text(123),
        "chosen": answers[0],
        "rejected": answers[1],
        "generations": answers,
        "rating": [9.0, 7.0],
        "status": write.rng.choice(["unchanged", "swapped", "tie"]),
        "chosen_score": 9.0,
        "in_gsm8k_train": False,
    }


def capybara(write: Writer, i: int) -> dict[str, Any]:
    history = [{"role": role, "content": write.text(200)} for role in ("user", "assistant", "user")]
    return {
        side: [*history, {"role": "assistant", "content": write.text(375)}]
        for side in ("chosen", "rejected")
    } | {"chosen_rating": 5, "rejected_rating": 4, "source": "synthetic"}


MAKERS: dict[str, Callable[[Writer, int], dict[str, Any]]] = {
    make.__name__: make
    for make in (
        hh_rlhf,
        shp,
        helpsteer,
        pku_saferlhf,
        ultrafeedback,
        ultrainteract,
        codeultrafeedback,
        argilla_math,
        orca,
        capybara,
    )
}


def make_rows(folder: Path, rows: int) -> dict[str, int]:
    """Write about `rows` raw rows, shared out like `RAW_ROWS`; the number of each set."""
    total = sum(RAW_ROWS.values())
    counts = {name: max(1, round(rows * count / total)) for name, count in RAW_ROWS.items()}
    for seed, (name, count) in enumerate(counts.items()):
        write = Writer(seed)
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as target:
            target.writelines(json.dumps(MAKERS[name](write, i)) + "\n" for i in range(count))
    return counts


def make_prompts(count: int) -> list[str]:
    """Prompts of about 80 tokens; one in ten repeats an earlier one with a word more."""
    write, prompts = Writer(99), []
    for number in range(count):
        copied = number % 10 == 9
        prompts.append(f"{write.rng.choice(prompts)} please" if copied else write.text(80))
    return prompts


def measure(rows: int, prompts: int) -> dict[str, Any]:
    """Seconds and memory of the build, rows a second of each set, seconds of de-duplication."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "raw").mkdir()
        counts = make_rows(folder / "raw", rows)
        with peak_memory() as peak:
            began = time.perf_counter()
            out = folder / "out"
            manifest = build("mix2", str(folder / "raw"), out, WORKERS, progress=False)
            seconds = time.perf_counter() - began
        own = psutil.Process().memory_info().rss / 2**30
    texts = make_prompts(prompts)
    began = time.perf_counter()
    kept, _ = deduplicate(texts)
    return {
        "rows": sum(counts.values()),
        "seconds": round(seconds, 1),
        "peak_gib": round(peak["gib"] + own, 2),
        "dedup_seconds": round(time.perf_counter() - began, 1),
        "records": manifest["records"],
        "prompts": prompts,
        "prompts_kept": len(kept),
        "rows_per_second": {
            name: round(count / manifest["seconds"][name]) for name, count in counts.items()
        },
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=850_000)
    parser.add_argument("--prompts", type=int, default=180_000)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    found = measure(options.rows, options.prompts)
    if options.json:
        print(
            json.dumps(
                {key: found[key] for key in ("rows", "seconds", "peak_gib", "dedup_seconds")}
            )
        )
        return
    for name, speed in found["rows_per_second"].items():
        print(f"{name:20} {speed:>9,} rows/s")
    print(
        f"{found['rows']:,} rows, {found['records']:,} pairs: {found['seconds']} s with {WORKERS} "
        f"workers, peak {found['peak_gib']} GiB"
    )
    print(
        f"{found['prompts']:,} prompts, {found['prompts_kept']:,} kept: {found['dedup_seconds']} s"
    )


if __name__ == "__main__":
    main()
