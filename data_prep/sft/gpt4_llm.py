"""GPT4-LLM, cleaned: Alpaca's instructions answered by GPT-4.

Schema: `instruction`, `input` (may be empty), `output`.
Rule: instruction, blank line and input make the question, then the role filter.
Confirmed: a component of the authors' mixture. Not verified: schema and licence.
Its origin is CC-BY-NC-4.0: a mix with it is for non-commercial use.
"""

from data_prep.records import joined, one_turn
from data_prep.schema import Demonstration
from data_prep.source import Drop, Row, Source, each_row, text


def convert_row(row: Row, drop: Drop) -> list[Demonstration]:
    """The instruction with its input, and the answer."""
    question = joined(text(row, "instruction"), text(row, "input"))
    return [one_turn(SOURCE.name, question, text(row, "output"))]


SOURCE = Source(
    name="gpt4_llm",
    kind="sft",
    hub_id="teknium/GPT4-LLM-Cleaned",
    licence="CC-BY-NC-4.0 (origin)",
    non_commercial=True,
    citation="Peng et al., 2023, arXiv:2304.03277",
    columns=("instruction", "input", "output"),
    convert=each_row(convert_row),
    notes="Confirmed: a component. Not verified: schema, licence.",
)
