"""Nectar: GPT-4 ranked seven answers to a prompt; the paper's offline DPO baseline uses it.

Schema: `prompt` (a transcript that ends in the assistant's marker), `answers` (`answer`, `model`,
`rank` with 1 the best).
Rule: one pair a prompt. Confirmed: `prompt`, `answers`, `rank`. Not stated: the paper's pair rule.
Choice: the best answer against a random worse one, or with `rule="best_vs_last"` against the worst;
the score is the rank with its sign turned, so that higher is better and ranks stay visible.
The licence is Apache-2.0, but the card asks for non-commercial use: the models' terms apply.
"""

from typing import Any

from data_prep.filters import check_prompt
from data_prep.pairing import Scored, paired_records, read_answers
from data_prep.schema import DataError, PreferencePair
from data_prep.source import Drop, Row, Source, each_row, items, number, text
from data_prep.transcript import read_transcript

_RULES = ("best_vs_random", "best_vs_last")


def convert_row(row: Row, drop: Drop, rule: str, seed: int) -> list[PreferencePair]:
    """One pair of the ranked answers to one prompt."""
    if rule not in _RULES:
        raise DataError(f"{SOURCE.name}: unknown rule {rule!r}; the rules are {', '.join(_RULES)}")
    prompt = check_prompt(read_transcript(text(row, "prompt"), open_end=True))
    scored = read_answers(items(row, "answers"), _read, drop)
    return paired_records(SOURCE.name, prompt, scored, drop, rule, seed=seed)


def _read(answer: Any) -> Scored:
    return text(answer, "answer"), -number(answer, "rank")


SOURCE = Source(
    name="nectar",
    kind="preference",
    hub_id="berkeley-nest/Nectar",
    files="*train*",
    licence="Apache-2.0 with a non-commercial caveat",
    non_commercial=True,
    citation="Zhu et al., 2023, Starling-7B",
    columns=("prompt", "answers"),
    convert=each_row(convert_row),
    options={"rule": "best_vs_random", "seed": 0},
    annotator="GPT-4",
    notes="Confirmed: prompt, answers, rank. Not stated: the paper's pair rule.",
)
