"""UltraFeedback: GPT-4 rated four models' answers to an instruction on four aspects.

Schema: `instruction` and `completions`, each with `response`, `overall_score` and
`annotations[aspect]["Rating"]`, a string that may be "N/A".
Rule: the score of an answer is the mean of its four ratings; all pairs but ties.
Confirmed: mean of the fine-grained ratings, not `overall_score`, of which some values are a 1 that
should be a 10 (Argilla's card); all pairs but ties. The same words gave 267,416 pairs in March
2024 and 340,025 in the paper, so some detail of the key is not documented.
Choice: an answer with a missing rating is dropped, since a mean over other aspects is no fair
comparison; `custom_system_prompt`, one for each completion, is left out of the prompt.
"""

from typing import Any

from data_prep.filters import user_turn
from data_prep.pairing import Scored, paired_records, read_answers
from data_prep.schema import DataError, PreferencePair
from data_prep.source import Drop, Row, Source, each_row, items, mapping, mean, number, text

ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")


def convert_row(
    row: Row, drop: Drop, key: str, pairs: str, min_margin: float, seed: int
) -> list[PreferencePair]:
    """Pairs of the answers to one instruction."""
    if key not in _READERS:
        raise DataError(f"{SOURCE.name}: unknown key {key!r}; the keys are {', '.join(_READERS)}")
    prompt = user_turn(text(row, "instruction"))
    scored = read_answers(items(row, "completions"), _READERS[key], drop)
    return paired_records(SOURCE.name, prompt, scored, drop, pairs, min_margin, seed)


def _fine_grained(completion: Any) -> Scored:
    response, annotations = text(completion, "response"), mapping(completion, "annotations")
    ratings = [number(mapping(annotations, aspect), "Rating") for aspect in ASPECTS]
    return response, mean(ratings)


def _overall(completion: Any) -> Scored:
    return text(completion, "response"), number(completion, "overall_score")


_READERS = {"fine_grained": _fine_grained, "overall": _overall}

SOURCE = Source(
    name="ultrafeedback",
    kind="preference",
    hub_id="openbmb/UltraFeedback",
    files="*.jsonl",
    licence="MIT",
    citation="Cui et al., 2023, arXiv:2310.01377",
    columns=("instruction", "completions"),
    convert=each_row(convert_row),
    options={"key": "fine_grained", "pairs": "all", "min_margin": 0.0, "seed": 0},
    annotator="GPT-4",
    paper={
        "prompts": 63591,
        "prompt_tokens": 161.5,
        "chosen_tokens": 279.5,
        "rejected_tokens": 211.1,
        "pairs": 340025,
    },
    notes=(
        "Confirmed: mean of the aspects, all pairs but ties. Choice: answers with a missing "
        "rating are dropped. The prompts contain TruthfulQA."
    ),
)
