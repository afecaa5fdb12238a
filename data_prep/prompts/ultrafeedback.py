"""UltraFeedback's instructions as prompts.

Schema: `instruction` (and the rated completions, not read here).
Rule: one user turn each.
Confirmed: one of the six sets. It holds TruthfulQA's questions, hence the contamination check.
"""

from data_prep.filters import user_turn
from data_prep.records import prompt_record
from data_prep.schema import Prompt
from data_prep.source import Drop, Row, Source, each_row, text


def convert_row(row: Row, drop: Drop) -> list[Prompt]:
    """The instruction as one user turn."""
    return [prompt_record(SOURCE.name, user_turn(text(row, "instruction")))]


SOURCE = Source(
    name="ultrafeedback_prompts",
    kind="prompts",
    hub_id="openbmb/UltraFeedback",
    files="*.jsonl",
    licence="MIT",
    citation="Cui et al., 2023, arXiv:2310.01377",
    columns=("instruction",),
    convert=each_row(convert_row),
    notes="Confirmed: one of the six sets; holds TruthfulQA.",
)
