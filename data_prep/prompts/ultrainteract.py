"""UltraInteract's trajectories as prompts: a task, earlier steps, and feedback on them.

Schema: `trajectory`, turns of `from` and `value`, and the next steps, not read here.
Rule: the trajectory as it is, the user's turn last; an unfinished one after the assistant's turn
is dropped.
Confirmed: one of the six sets; the schema (public converters). Not documented: whether only the
bare tasks were taken. Choice: the whole trajectory, as in the preference pairs. Rows that share a
trajectory are for `prompt_set` to join.
"""

from data_prep.filters import read_messages
from data_prep.records import prompt_record
from data_prep.schema import Prompt
from data_prep.source import Drop, Row, Source, each_row


def convert_row(row: Row, drop: Drop) -> list[Prompt]:
    """The trajectory as a conversation that ends on the user's turn."""
    trajectory = read_messages(row, "trajectory", role_key="from", content_key="value")
    return [prompt_record(SOURCE.name, trajectory)]


SOURCE = Source(
    name="ultrainteract_prompts",
    kind="prompts",
    hub_id="openbmb/UltraInteract_pair",
    licence="MIT",
    citation="Yuan et al., 2024, arXiv:2404.02078",
    columns=("trajectory",),
    convert=each_row(convert_row),
    notes="Confirmed: one of the six sets, schema. Choice: whole trajectories.",
)
