"""Magicoder Evol-Instruct: programming tasks, evolved and decontaminated.

Schema: `instruction`, `response`.
Rule: the two texts are one turn each, then the role filter.
Confirmed: a component of the authors' mixture. Not verified: schema and licence.
"""

from data_prep.records import one_turn
from data_prep.schema import Demonstration
from data_prep.source import Drop, Row, Source, each_row, text


def convert_row(row: Row, drop: Drop) -> list[Demonstration]:
    """The task and its solution."""
    return [one_turn(SOURCE.name, text(row, "instruction"), text(row, "response"))]


SOURCE = Source(
    name="magicoder",
    kind="sft",
    hub_id="ise-uiuc/Magicoder-Evol-Instruct-110K",
    licence="Apache-2.0",
    citation="Wei et al., 2023, arXiv:2312.02120",
    columns=("instruction", "response"),
    convert=each_row(convert_row),
    notes="Confirmed: a component. Not verified: schema, licence.",
)
