"""SlimOrca: GPT-4's answers to FLAN tasks, most with a system turn, checked for correctness.

Schema: `conversations`, turns of `from` (system, human, gpt), `value` and `weight`.
Rule: the role filter. `fold` puts the system turn into the first user turn, for chat templates
that know no system role.
Confirmed: a component of the authors' mixture, whose filter allows a system turn first. Not
verified: schema and licence. Choice: the system turn is kept.
"""

from data_prep.filters import fold_system
from data_prep.records import demonstration, read_conversation
from data_prep.schema import Demonstration
from data_prep.source import Drop, Row, Source, each_row


def convert_row(row: Row, drop: Drop, fold: bool) -> list[Demonstration]:
    """The conversation with its system turn, or with the system turn folded."""
    messages = read_conversation(row)
    return [demonstration(SOURCE.name, fold_system(messages) if fold else messages)]


SOURCE = Source(
    name="slimorca",
    kind="sft",
    hub_id="Open-Orca/SlimOrca",
    licence="MIT",
    citation="Lian et al., 2023, SlimOrca",
    columns=("conversations",),
    convert=each_row(convert_row),
    options={"fold": False},
    notes="Confirmed: a component, system turns allowed. Not verified: schema, licence.",
)
