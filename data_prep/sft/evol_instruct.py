"""WizardLM Evol-Instruct V2: instructions made harder step by step, answered by ChatGPT.

Schema: `idx` and `conversations`, turns of `from` (human, gpt) and `value`.
Rule: trim both ends, then the role filter, as for ShareGPT.
Confirmed: a component of the authors' mixture. Not verified: schema and licence.
"""

from data_prep.records import demonstration, read_conversation, trim
from data_prep.schema import Demonstration
from data_prep.source import Drop, Row, Source, each_row


def convert_row(row: Row, drop: Drop) -> list[Demonstration]:
    """The conversation from its first user turn to its last answer."""
    return [demonstration(SOURCE.name, trim(read_conversation(row), drop))]


SOURCE = Source(
    name="evol_instruct",
    kind="sft",
    hub_id="WizardLM/WizardLM_evol_instruct_V2_196k",
    licence="MIT",
    citation="Xu et al., 2023, arXiv:2304.12244",
    columns=("conversations",),
    convert=each_row(convert_row),
    notes="Confirmed: a component. Not verified: schema, licence.",
)
