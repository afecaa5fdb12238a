"""CodeUltraFeedback: GPT-3.5 rated four models' code on one of five coding preferences.

Schema: `instruction`, `preference`, `responses` (`model`, `response`), `annotations` (`model`,
`rating` as a string, `rationale`).
Rule: bring response and rating together by `model`, never by position; all pairs but ties.
Confirmed: schema; 50,156 pairs of at most 60,000 agree with dropping ties only. Choice: when two
responses or two ratings name one model, those answers are dropped, since none can be matched.
"""

from collections import Counter
from typing import Any

from data_prep.filters import user_turn
from data_prep.pairing import Scored, paired_records, read_answers
from data_prep.schema import PreferencePair
from data_prep.source import Drop, Rejected, Row, Source, each_row, items, number, text


def convert_row(
    row: Row, drop: Drop, pairs: str, min_margin: float, seed: int
) -> list[PreferencePair]:
    """Pairs of the answers to one instruction."""
    prompt = user_turn(text(row, "instruction"))
    responses, annotations = items(row, "responses"), items(row, "annotations")
    answered = Counter(map(_model, responses))
    rated = Counter(map(_model, annotations))
    ratings = {_model(annotation): annotation for annotation in annotations}

    def read(response: Any) -> Scored:
        model = text(response, "model")
        if answered[model] != 1 or rated[model] != 1:
            raise Rejected("answer_unmatched")
        return text(response, "response"), number(ratings[model], "rating")

    scored = read_answers(responses, read, drop)
    for annotation in annotations:
        if _model(annotation) not in answered:
            drop("answer_unmatched", annotation)
    return paired_records(SOURCE.name, prompt, scored, drop, pairs, min_margin, seed)


def _model(entry: Any) -> str | None:
    try:
        return text(entry, "model")
    except Rejected:
        return None


SOURCE = Source(
    name="codeultrafeedback",
    kind="preference",
    hub_id="coseal/CodeUltraFeedback",
    files="*train*",
    licence="MIT",
    citation="Weyssow et al., 2024, arXiv:2403.09032",
    columns=("instruction", "responses", "annotations"),
    convert=each_row(convert_row),
    options={"pairs": "all", "min_margin": 0.0, "seed": 0},
    annotator="GPT-3.5",
    paper={
        "prompts": 9938,
        "prompt_tokens": 172.8,
        "chosen_tokens": 427.6,
        "rejected_tokens": 400.6,
        "pairs": 50156,
    },
    notes="Confirmed: schema, all pairs but ties. Choice: a model named twice is unmatched.",
)
