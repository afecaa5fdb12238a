"""Format instructions that code can check: how they are worded, kept and tested.

An instruction is a small dict, for example ``{"kind": "bullet_points", "n": 3}``. For each kind
there are two or more wordings (`WORDINGS`), a renderer that writes a reference answer which keeps
it (`render`), and a check (`kept`). Some kinds ask for more text and some for less, so that the
length of an answer does not give away which of two answers is better.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

Instruction = dict[str, Any]

WORDINGS: dict[str, tuple[str, ...]] = {
    "at_most_words": ("Use at most {n} words.", "Answer in no more than {n} words."),
    "at_least_words": ("Use at least {n} words.", "Write {n} words or more."),
    "one_sentence": ("Answer in exactly one sentence.", "Reply with a single sentence."),
    "n_sentences": ("Answer in exactly {n} sentences.", "Write exactly {n} sentences."),
    "bullet_points": (
        'Answer with exactly {n} bullet points, each starting with "- ".',
        'Give exactly {n} bullet points ("- ").',
    ),
    "numbered_list": (
        'Answer with a numbered list of exactly {n} items ("1.", "2.", ...).',
        "Reply as a numbered list with exactly {n} items.",
    ),
    "json_keys": (
        'Reply with valid JSON only, with the keys "answer" and "reason".',
        'Answer as a JSON object with the keys "answer" and "reason".',
    ),
    "starts_with": ('Start your answer with "{text}"', 'Begin with "{text}"'),
    "ends_with": ('End your answer with "{text}"', 'Finish with the words "{text}"'),
    "no_commas": ("Do not use any commas.", "Write without commas."),
}

KINDS: tuple[str, ...] = tuple(WORDINGS)

PARAMETERS: dict[str, tuple[Instruction, ...]] = {
    "at_most_words": ({"n": 20},),
    "at_least_words": ({"n": 25},),
    "n_sentences": ({"n": 2},),
    "bullet_points": ({"n": 3},),
    "numbered_list": ({"n": 3},),
    "starts_with": ({"text": "Answer:"}, {"text": "In short,"}),
    "ends_with": ({"text": "I hope this helps."}, {"text": "That is all."}),
}


def words(text: str) -> list[str]:
    """The whitespace-separated words of a text; the unit of every word count in the course."""
    return text.split()


def sentences(text: str) -> list[str]:
    """Split at `.`, `!` or `?` followed by space or the end; `3.5` stays whole."""
    parts = re.split(r"(?<=[.!?])[\"')\]*]*(?:\s+|$)", text.strip())
    return [part for part in parts if re.search(r"\w", part)]


def describe(instruction: Instruction, wording: int = 0) -> str:
    """The instruction as the user writes it; `wording` picks one of the kind's phrasings."""
    choices = WORDINGS[instruction["kind"]]
    return choices[wording % len(choices)].format(**instruction)


def kept(instruction: Instruction, text: str) -> bool:
    """True if the answer keeps the instruction. An empty answer keeps none.

    Raises KeyError for an unknown kind.
    """
    check = CHECKS[instruction["kind"]]
    return bool(text.strip()) and check(text.strip(), instruction)


def render(instruction: Instruction | None, short: str, points: Sequence[str]) -> str:
    """Write a reference answer that keeps the instruction.

    `short` is the answer in one sentence and `points` says the same in three sentences.
    """
    if instruction is None:
        return " ".join(points)
    return RENDERERS[instruction["kind"]](short, list(points), instruction)


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def _is_list(text: str, pattern: str, count: int) -> bool:
    lines = _lines(text)
    return len(lines) == count and all(re.match(pattern, line) for line in lines)


def _numbered(text: str, count: int) -> bool:
    lines = _lines(text)
    return len(lines) == count and all(
        re.match(rf"\s*{number}\.\s+\S", line) for number, line in enumerate(lines, 1)
    )


def _json_with_keys(text: str) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return isinstance(value, dict) and set(value) == {"answer", "reason"}


def _merge(points: list[str], count: int) -> list[str]:
    """Join the last points so that `count` remain."""
    return [*points[: count - 1], " ".join(points[count - 1 :])]


def _as_one_sentence(point: str) -> str:
    first, *rest = (part.rstrip(".") for part in sentences(point))
    return first + "".join("; " + part[0].lower() + part[1:] for part in rest) + "."


CHECKS: dict[str, Callable[[str, Instruction], bool]] = {
    "at_most_words": lambda text, i: len(words(text)) <= i["n"],
    "at_least_words": lambda text, i: len(words(text)) >= i["n"],
    "one_sentence": lambda text, i: len(sentences(text)) == 1 and len(_lines(text)) == 1,
    "n_sentences": lambda text, i: len(sentences(text)) == i["n"],
    "bullet_points": lambda text, i: _is_list(text, r"\s*- \S", i["n"]),
    "numbered_list": lambda text, i: _numbered(text, i["n"]),
    "json_keys": lambda text, i: _json_with_keys(text),
    "starts_with": lambda text, i: text.startswith(i["text"]),
    "ends_with": lambda text, i: text.endswith(i["text"]),
    "no_commas": lambda text, i: "," not in text,
}

RENDERERS: dict[str, Callable[[str, list[str], Instruction], str]] = {
    "at_most_words": lambda short, points, i: short,
    "at_least_words": lambda short, points, i: " ".join([short, *points]),
    "one_sentence": lambda short, points, i: short,
    "n_sentences": lambda short, points, i: " ".join(
        _as_one_sentence(point) for point in _merge(points, i["n"])
    ),
    "bullet_points": lambda short, points, i: "\n".join(
        f"- {point}" for point in _merge(points, i["n"])
    ),
    "numbered_list": lambda short, points, i: "\n".join(
        f"{number}. {point}" for number, point in enumerate(_merge(points, i["n"]), 1)
    ),
    "json_keys": lambda short, points, i: json.dumps(
        {"answer": short, "reason": " ".join(points[:2])}, ensure_ascii=False
    ),
    "starts_with": lambda short, points, i: f"{i['text']} " + " ".join(points),
    "ends_with": lambda short, points, i: " ".join(points) + f" {i['text']}",
    "no_commas": lambda short, points, i: " ".join(points).replace(",", ""),
}
