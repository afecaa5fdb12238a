"""The embedded miniature: prompts, demonstrations and preference pairs that ship with the course.

There is no network at run time, so the default profile learns from data written for this project:
480 short questions in four sections, each with a reference answer, the facts an answer must
contain and, for most, a format instruction that code can check. The candidates of the preference
pairs are stored samples of SmolLM2-135M-Instruct after SFT (`samples.jsonl`, made by
`rlhf_guide.stored_samples`), written references, and corruptions of known kind. The preferences
themselves are simulated: see `rlhf_guide.oracle`.

Splits are disjoint by prompt and stratified by section.
"""

import hashlib
import json
import math
import random
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from itertools import combinations
from typing import Any

from data_prep import instructions
from data_prep.schema import DataError, Demonstration, Prompt

SECTIONS = ("chat", "chat_hard", "safety", "reasoning")

# Questions of each section in each split, in the order in which they are dealt.
SPLITS = {
    "sft": 15,
    "preference_train": 25,
    "preference_heldout": 12,
    "online_1": 12,
    "online_2": 12,
    "online_3": 12,
    "validation": 6,
    "evaluation": 26,
}

# Training questions are asked several times, each time with another format instruction: the same
# content is then right in one format and wrong in another.
VARIANTS = {"sft": 3, "preference_train": 3, "online_1": 2, "online_2": 2, "online_3": 2}

# One prompt in seven carries no format instruction.
_NO_INSTRUCTION_EVERY = 7
_SPLIT_SEED = 20240513  # fixes the deal; changing it changes every split


def load_prompts(split: str) -> list[Prompt]:
    """The prompts of one split, in a fixed order.

    Each record has `prompt_id`, `messages` (one user turn), `source`, and what makes the true
    utility known: `section`, `topic`, `facts` (each a list of accepted strings), `instruction`
    (or None) and `reference`, an answer that holds every fact and keeps the instruction.

    Raises DataError for an unknown split.
    """
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
    return [dict(prompt) for prompt in _deal()[split]]


def load_demonstrations() -> list[Demonstration]:
    """The SFT split as conversations: the question and its reference answer."""
    return [
        {
            "id": prompt["prompt_id"],
            "messages": [*prompt["messages"], _answer(prompt["reference"])],
            "source": prompt["source"],
        }
        for prompt in load_prompts("sft")
    ]


def load_candidates(split: str) -> dict[str, list[dict[str, Any]]]:
    """Candidate answers by prompt: reference, stored samples and two corruptions.

    Each candidate is `{"text", "kind", "finish_reason"}` with kind `reference`,
    `corruption:<name>` or `sample:<model>`. Of the corruptions a pool holds `wrong_format` and one
    other, so that the model's own answers stay the greater part. Equal texts are kept once.
    """
    samples = _samples()
    pool = {}
    for prompt in load_prompts(split):
        wrong_format, *others = corruptions(prompt)
        candidates = [
            _candidate(prompt["reference"], "reference"),
            wrong_format,
            others[_stable_hash("pool", prompt["prompt_id"]) % len(others)],
            *samples.get(prompt["prompt_id"], []),
        ]
        unique = {candidate["text"]: candidate for candidate in reversed(candidates)}
        pool[prompt["prompt_id"]] = [
            candidate for candidate in candidates if unique[candidate["text"]] is candidate
        ]
    return pool


def corruptions(prompt: Prompt) -> list[dict[str, Any]]:
    """Spoil the reference in known ways: the hand-made negatives of the miniature.

    `wrong_format` is right in content but keeps another instruction, `wrong_topic` answers another
    question in the right format, `repetition` says its first half again and again, `truncated`
    breaks off in mid-sentence, `missing_facts` says one point only.
    """
    rng = random.Random(_stable_hash("corruption", prompt["prompt_id"]))
    short, points = prompt["short"], prompt["points"]
    other = rng.choice([row for row in _deal()["sft"] if row["topic"] != prompt["topic"]])
    reference = prompt["reference"].split(" ")
    half = " ".join(reference[: len(reference) // 2])
    spoiled = {
        "wrong_format": instructions.render(_another_format(prompt, rng), short, points),
        "wrong_topic": instructions.render(prompt["instruction"], other["short"], other["points"]),
        "repetition": " ".join([half] * 3),
        "truncated": half,
        "missing_facts": instructions.render(None, "", points[:1]),
    }
    return [
        _candidate(text, f"corruption:{name}", "length" if name == "truncated" else "stop")
        for name, text in spoiled.items()
    ]


def build_pairs(
    split: str,
    utility: Callable[[Prompt, str, str], float],
    prefer: Callable[[dict[str, Any], dict[str, Any], str], bool],
    pairs_per_question: int | None = 6,
    min_margin: float = 0.1,
    seed: int = 0,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Preference pairs for a split, balanced so that length does not give the answer away.

    `utility(prompt, text, finish_reason)` scores a candidate and `prefer(a, b, key)` is the
    annotator's simulated choice (`rlhf_guide.oracle.annotator`). Pairs whose utilities differ by
    less than `min_margin` are dropped as ties (paper, appendix B.1: small margins are removed).
    For each prompt the builder draws in turn a pair whose chosen answer is the longer and one
    whose chosen answer is the shorter, as far as both exist; a question's variants share the
    `pairs_per_question`. With None it keeps every clear pair, unbalanced. Returns the pairs and
    counts of what was dropped.
    """
    candidates = load_candidates(split)
    counts = {"candidate_pairs": 0, "tie_or_small_margin": 0, "not_drawn": 0, "kept": 0}
    rows: list[dict[str, Any]] = []
    balance = 0  # pairs whose chosen answer is the longer, minus the others
    for prompt in load_prompts(split):
        scored = [
            {**c, "utility": utility(prompt, c["text"], c["finish_reason"])}
            for c in candidates[prompt["prompt_id"]]
        ]
        possible = list(combinations(scored, 2))
        clear = [p for p in possible if abs(p[0]["utility"] - p[1]["utility"]) >= min_margin]
        judged = [
            (a, b) if prefer(a, b, f"{prompt['prompt_id']}/{i}") else (b, a)
            for i, (a, b) in enumerate(clear)
        ]
        random.Random(_stable_hash(seed, prompt["prompt_id"])).shuffle(judged)
        if pairs_per_question is None:
            drawn = judged
        else:
            share = math.ceil(pairs_per_question / VARIANTS.get(split, 1))
            drawn, balance = _draw_balanced(judged, share, balance)
        rows += [_pair(prompt, chosen, rejected) for chosen, rejected in drawn]
        counts["candidate_pairs"] += len(possible)
        counts["tie_or_small_margin"] += len(possible) - len(clear)
        counts["not_drawn"] += len(clear) - len(drawn)
        counts["kept"] += len(drawn)
    return rows, counts


def _draw_balanced(judged: Sequence[tuple], count: int, balance: int) -> tuple[list[tuple], int]:
    """Draw up to `count` (chosen, rejected) pairs, each time from the side that is behind."""
    sides: dict[bool, list[tuple]] = {True: [], False: []}
    for chosen, rejected in judged:
        if len(chosen["text"]) != len(rejected["text"]):
            sides[len(chosen["text"]) > len(rejected["text"])].append((chosen, rejected))
    drawn = []
    while len(drawn) < count:
        longer_wanted = balance <= 0
        if not sides[longer_wanted]:
            break
        drawn.append(sides[longer_wanted].pop())
        balance += 1 if longer_wanted else -1
    return drawn, balance


def _pair(prompt: Prompt, chosen: dict[str, Any], rejected: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompt_id": prompt["prompt_id"],
        "chosen": [*prompt["messages"], _answer(chosen["text"])],
        "rejected": [*prompt["messages"], _answer(rejected["text"])],
        "chosen_score": chosen["utility"],
        "rejected_score": rejected["utility"],
        "source": prompt["source"],
        "section": prompt["section"],
        "chosen_kind": chosen["kind"],
        "rejected_kind": rejected["kind"],
        "chosen_finish_reason": chosen["finish_reason"],
        "rejected_finish_reason": rejected["finish_reason"],
    }


@cache
def _deal() -> dict[str, list[Prompt]]:
    """Deal every section's questions to the splits and give each its instructions."""
    decks = {section: _Deck(section) for section in SECTIONS}
    splits: dict[str, list[Prompt]] = {}
    for split, size in SPLITS.items():
        items = [deck.items.pop() for _ in range(size) for deck in decks.values()]
        used: list[list[str | None]] = [[] for _ in items]
        splits[split] = []
        for variant in range(VARIANTS.get(split, 1)):
            # Sections in turn, so that the first n prompts of a split are of every section.
            for item, before in zip(items, used, strict=True):
                deck = decks[item["section"]]
                before.append(deck.draw_kind(before))
                splits[split].append(_prompt(item, variant, before[-1], deck.rng))
    return splits


class _Deck:
    """One section's questions, and instruction kinds each dealt as often as the others."""

    def __init__(self, section: str):
        self.rng = random.Random(_stable_hash(_SPLIT_SEED, section))
        self.items = _questions(section)
        self.rng.shuffle(self.items)
        self.kinds: list[str] = []
        self.dealt = 0

    def draw_kind(self, used: Sequence[str | None]) -> str | None:
        """The next kind that the question does not have yet; None for every seventh prompt."""
        self.dealt += 1
        if self.dealt % _NO_INSTRUCTION_EVERY == 0:
            return None
        if not set(self.kinds) - set(used):
            self.kinds += self.rng.sample(instructions.KINDS, len(instructions.KINDS))
        kind = next(kind for kind in self.kinds if kind not in used)
        self.kinds.remove(kind)
        return kind


def _prompt(item: dict[str, Any], variant: int, kind: str | None, rng: random.Random) -> Prompt:
    instruction, request = None, item["question"]
    if kind is not None:
        values = rng.choice(instructions.PARAMETERS.get(kind, ({},)))
        instruction = {"kind": kind, **values}
        wording = rng.randrange(len(instructions.WORDINGS[kind]))
        request = f"{request} {instructions.describe(instruction, wording)}"
    return {
        "prompt_id": f"{item['section']}-{item['number']:03d}"
        + (f"-{variant + 1}" if variant else ""),
        "messages": [{"role": "user", "content": request}],
        "source": "embedded",
        "section": item["section"],
        "topic": item["topic"],
        "facts": item["facts"],
        "instruction": instruction,
        "reference": instructions.render(instruction, item["short"], item["points"]),
        "short": item["short"],
        "points": item["points"],
    }


def _questions(section: str) -> list[dict[str, Any]]:
    text = files("data_prep").joinpath(f"embedded/{section}.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return [{"section": section, "number": number, **row} for number, row in enumerate(rows, 1)]


@cache
def _samples() -> dict[str, list[dict[str, Any]]]:
    path = files("data_prep").joinpath("embedded/samples.jsonl")
    pool: dict[str, list[dict[str, Any]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        pool[row["prompt_id"]] = pool.get(row["prompt_id"], []) + [
            _candidate(answer["text"], f"sample:{row['model']}", answer["finish_reason"])
            for answer in row["responses"]
            if answer["text"].strip()
        ]
    return pool


def _another_format(prompt: Prompt, rng: random.Random) -> instructions.Instruction:
    """An instruction that the prompt did not give and whose rendering breaks the prompt's own."""
    own = prompt["instruction"]
    for kind in rng.sample(instructions.KINDS, len(instructions.KINDS)):
        other = {"kind": kind, **instructions.PARAMETERS.get(kind, ({},))[0]}
        text = instructions.render(other, prompt["short"], prompt["points"])
        if own is None or not instructions.kept(own, text):
            return other
    raise DataError(f"{prompt['prompt_id']}: every other format keeps its instruction {own}")


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _candidate(text: str, kind: str, finish_reason: str = "stop") -> dict[str, str]:
    return {"text": text, "kind": kind, "finish_reason": finish_reason}


def _stable_hash(*parts: Any) -> int:
    """A seed that depends on its arguments only, not on the process (unlike `hash`)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")
