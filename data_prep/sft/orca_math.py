"""Orca-Math: grade-school word problems written and solved by GPT-4 agents.

Schema: `question`, `answer`.
Rule: the two texts are one turn each, then the role filter.
Confirmed: a component of the authors' mixture. Not verified: schema and licence.
"""

from data_prep.records import one_turn
from data_prep.schema import Demonstration
from data_prep.source import Drop, Row, Source, each_row, text


def convert_row(row: Row, drop: Drop) -> list[Demonstration]:
    """The word problem and its solution."""
    return [one_turn(SOURCE.name, text(row, "question"), text(row, "answer"))]


SOURCE = Source(
    name="orca_math",
    kind="sft",
    hub_id="microsoft/orca-math-word-problems-200k",
    licence="MIT",
    citation="Mitra et al., 2024, arXiv:2402.14830",
    columns=("question", "answer"),
    convert=each_row(convert_row),
    notes="Confirmed: a component. Not verified: schema, licence.",
)
