"""Argilla-Math: pairs of answers to mathematical questions, rated by GPT-4.

Schema: `instruction`, `chosen_response`, `chosen_rating`, `rejected_response`, `rejected_rating`.
Rule: one pair a row. Confirmed: schema; the paper's 2,418 pairs are all rows. Choice: the general
rules still hold, so equal, missing or contradicting ratings are dropped and counted; if the set
has any, the count falls below the paper's.
"""

from data_prep.filters import user_turn
from data_prep.pairing import one_record
from data_prep.schema import PreferencePair
from data_prep.source import Drop, Row, Source, each_row, number, text


def convert_row(row: Row, drop: Drop) -> list[PreferencePair]:
    """The row's pair with its ratings as scores."""
    prompt = user_turn(text(row, "instruction"))
    chosen, rejected = text(row, "chosen_response"), text(row, "rejected_response")
    scores = number(row, "chosen_rating"), number(row, "rejected_rating")
    return [one_record(SOURCE.name, prompt, chosen, rejected, scores)]


SOURCE = Source(
    name="argilla_math",
    kind="preference",
    hub_id="argilla/distilabel-math-preference-dpo",
    files="*train*",
    licence="Apache-2.0",
    citation="Argilla, 2023, distilabel-math-preference-dpo",
    columns=(
        "instruction",
        "chosen_response",
        "chosen_rating",
        "rejected_response",
        "rejected_rating",
    ),
    convert=each_row(convert_row),
    annotator="GPT-4",
    paper={
        "prompts": 2352,
        "prompt_tokens": 36.5,
        "chosen_tokens": 276.5,
        "rejected_tokens": 265.3,
        "pairs": 2418,
    },
    notes="Confirmed: schema, every row is a pair. Choice: equal ratings are dropped.",
)
