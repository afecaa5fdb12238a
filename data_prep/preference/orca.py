"""Orca (distilabel): Intel's Orca pairs, compared anew by GPT-4.

Schema: `system`, `input`, `chosen`, `rejected`, `generations` and `rating` (two each, in one
order), `status` ("tie", "unchanged" or "swapped"), `chosen_score`, `in_gsm8k_train`.
Rule: drop ties and missing ratings; the higher rating is the chosen score, the lower the rejected
one; the system prompt goes in front of the question.
Confirmed: schema, 12,859 rows, ties dropped (March 2024: 6,405 pairs). Not documented: the script
behind the paper's 6,926 pairs. Choice: a pair is dropped when `generations` and `rating`, or
`chosen_score`, say that the chosen answer is the lower one. Argilla's own recipe is
`min_chosen_score=8, drop_gsm8k=True`.
"""

from data_prep.filters import check_prompt, fold_system
from data_prep.pairing import one_record
from data_prep.schema import PreferencePair
from data_prep.source import Drop, Rejected, Row, Source, each_row, flag, items, number, text

_STATUSES = ("tie", "unchanged", "swapped")


def convert_row(
    row: Row, drop: Drop, min_chosen_score: float | None, drop_gsm8k: bool
) -> list[PreferencePair]:
    """The row's pair with its ratings as scores."""
    system, question = text(row, "system"), text(row, "input")
    turns = [("system", system), ("user", question)]
    messages = [{"role": role, "content": content} for role, content in turns]
    prompt = check_prompt(fold_system(messages))
    chosen, rejected = text(row, "chosen"), text(row, "rejected")
    high, low = _scores(row, chosen, rejected)
    record = one_record(SOURCE.name, prompt, chosen, rejected, (high, low))
    if min_chosen_score is not None and high < min_chosen_score:
        raise Rejected("low_score")
    if drop_gsm8k and flag(row, "in_gsm8k_train"):
        raise Rejected("in_gsm8k_train")
    return [record]


def _scores(row: Row, chosen: str, rejected: str) -> tuple[float, float]:
    if row.get("rating") is None:
        raise Rejected("missing_rating")
    ratings = items(row, "rating")
    if len(ratings) != 2:
        raise Rejected("length_mismatch")
    first, second = (
        number({"rating": ratings[0]}, "rating"),
        number({"rating": ratings[1]}, "rating"),
    )
    status = text(row, "status")
    if status not in _STATUSES:
        raise Rejected("malformed")
    if status == "tie":
        raise Rejected("status_tie")
    high, low = max(first, second), min(first, second)
    generations = items(row, "generations")
    if generations == [chosen, rejected]:
        high, low = first, second
    elif generations == [rejected, chosen]:
        high, low = second, first
    if row.get("chosen_score") is not None and number(row, "chosen_score") != high:
        raise Rejected("label_contradicts_scores")
    return high, low


SOURCE = Source(
    name="orca",
    kind="preference",
    hub_id="argilla/distilabel-intel-orca-dpo-pairs",
    files="*train*",
    licence="Apache-2.0",
    citation="Argilla, 2024, distilabel-intel-orca-dpo-pairs",
    columns=(
        "system",
        "input",
        "chosen",
        "rejected",
        "generations",
        "rating",
        "status",
        "chosen_score",
        "in_gsm8k_train",
    ),
    convert=each_row(convert_row),
    options={"min_chosen_score": None, "drop_gsm8k": False},
    annotator="GPT-4",
    paper={
        "prompts": 6791,
        "prompt_tokens": 153.3,
        "chosen_tokens": 165.4,
        "rejected_tokens": 260.5,
        "pairs": 6926,
    },
    notes="Confirmed: schema, ties dropped. Not documented: the filter behind 6,926 pairs.",
)
