"""GPTeacher, general instructions: self-instructed tasks written by GPT-4.

Schema: `instruction`, `input` (may be empty), `response`.
Rule: instruction, blank line and input make the question, then the role filter.
Confirmed: a component of the authors' mixture. Not verified: schema and licence.
"""

from data_prep.records import joined, one_turn
from data_prep.schema import Demonstration
from data_prep.source import Drop, Row, Source, each_row, text


def convert_row(row: Row, drop: Drop) -> list[Demonstration]:
    """The instruction with its input, and the answer."""
    question = joined(text(row, "instruction"), text(row, "input"))
    return [one_turn(SOURCE.name, question, text(row, "response"))]


SOURCE = Source(
    name="gpteacher",
    kind="sft",
    hub_id="teknium/GPTeacher-General-Instruct",
    licence="MIT",
    citation="Teknium, 2023, GPTeacher",
    columns=("instruction", "input", "response"),
    convert=each_row(convert_row),
    notes="Confirmed: a component. Not verified: schema, licence.",
)
