"""DIBT-10K: ten thousand prompts whose quality a community rated.

Schema: `prompt`, `avg_rating`, `kind`, `topic` and others.
Rule: one user turn each.
Confirmed: one of the six sets. Not verified: schema and licence. Not documented: whether low-rated
prompts were left out; here they stay.
"""

from data_prep.filters import user_turn
from data_prep.records import prompt_record
from data_prep.schema import Prompt
from data_prep.source import Drop, Row, Source, each_row, text


def convert_row(row: Row, drop: Drop) -> list[Prompt]:
    """The prompt as one user turn."""
    return [prompt_record(SOURCE.name, user_turn(text(row, "prompt")))]


SOURCE = Source(
    name="dibt_prompts",
    kind="prompts",
    hub_id="DIBT/10k_prompts_ranked",
    licence="not verified: see the data card",
    citation="DIBT community, 2024, 10k_prompts_ranked",
    columns=("prompt",),
    convert=each_row(convert_row),
    notes="Confirmed: one of the six sets. Not verified: schema, licence.",
)
