"""Capybara (distilabel, filtered): conversations of several turns with two rated last answers.

Schema: `chosen` and `rejected` (lists of `role` and `content`), `chosen_rating`,
`rejected_rating`.
Rule: one pair a row, after the six rules of the standard format.
Confirmed: schema; the paper's 14,811 pairs are all rows of the filtered set (its footnote names
the 7k set, but the counts fit this one). Choice: the general rules still hold, so equal, missing or
contradicting ratings are dropped and counted; a system turn is folded into the first user turn.
"""

from data_prep.filters import fold_system, read_messages
from data_prep.pairing import one_record
from data_prep.schema import PreferencePair, pair_problem
from data_prep.source import Drop, Rejected, Row, Source, each_row, number


def convert_row(row: Row, drop: Drop) -> list[PreferencePair]:
    """The row's pair with its ratings as scores."""
    pair = {key: fold_system(read_messages(row, key)) for key in ("chosen", "rejected")}
    problem = pair_problem(pair)
    if problem:
        raise Rejected(problem)
    scores = number(row, "chosen_rating"), number(row, "rejected_rating")
    *prompt, chosen = pair["chosen"]
    rejected = pair["rejected"][-1]
    return [one_record(SOURCE.name, prompt, chosen["content"], rejected["content"], scores)]


SOURCE = Source(
    name="capybara",
    kind="preference",
    hub_id="argilla/Capybara-Preferences-Filtered",
    files="*train*",
    licence="Apache-2.0",
    citation="Argilla, 2024, Capybara-Preferences-Filtered",
    columns=("chosen", "chosen_rating", "rejected", "rejected_rating"),
    convert=each_row(convert_row),
    annotator="GPT-4",
    paper={
        "prompts": 14740,
        "prompt_tokens": 634.5,
        "chosen_tokens": 348.4,
        "rejected_tokens": 401.9,
        "pairs": 14811,
    },
    notes="Confirmed: schema, every row is a pair. Choice: equal ratings are dropped.",
)
