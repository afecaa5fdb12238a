"""HelpSteer's prompts.

Schema: one row an answer, so a `prompt` comes up to four times.
Rule: one user turn each; `prompt_set` removes the repetitions.
Confirmed: one of the six sets, and the column.
"""

from data_prep.filters import user_turn
from data_prep.records import prompt_record
from data_prep.schema import Prompt
from data_prep.source import Drop, Row, Source, each_row, text


def convert_row(row: Row, drop: Drop) -> list[Prompt]:
    """The prompt as one user turn."""
    return [prompt_record(SOURCE.name, user_turn(text(row, "prompt")))]


SOURCE = Source(
    name="helpsteer_prompts",
    kind="prompts",
    hub_id="nvidia/HelpSteer",
    files="*train*",
    licence="CC-BY-4.0",
    citation="Wang et al., 2023, arXiv:2311.09528",
    columns=("prompt",),
    convert=each_row(convert_row),
    notes="Confirmed: one of the six sets. Not verified: licence.",
)
