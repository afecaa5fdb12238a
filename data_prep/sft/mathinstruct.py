"""MathInstruct: math questions with solutions as reasoning or as programs.

Schema: `source`, `instruction`, `output`.
Rule: the two texts are one turn each, then the role filter.
Confirmed: a component of the authors' mixture. Not verified: schema and licence.
The set joins 13 sources with licences of their own.
"""

from data_prep.records import one_turn
from data_prep.schema import Demonstration
from data_prep.source import Drop, Row, Source, each_row, text


def convert_row(row: Row, drop: Drop) -> list[Demonstration]:
    """The question and its solution."""
    return [one_turn(SOURCE.name, text(row, "instruction"), text(row, "output"))]


SOURCE = Source(
    name="mathinstruct",
    kind="sft",
    hub_id="TIGER-Lab/MathInstruct",
    licence="MIT, mixed sources",
    citation="Yue et al., 2023, arXiv:2309.05653",
    columns=("instruction", "output"),
    convert=each_row(convert_row),
    notes="Confirmed: a component. Not verified: schema, licence.",
)
