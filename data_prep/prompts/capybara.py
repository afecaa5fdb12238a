"""Capybara's conversations as prompts: everything before the last answer.

Schema: `chosen`, a list of `role` and `content` that ends with an answer, and other columns.
Rule: take the last answer away; the rest must be a prompt.
Confirmed: one of the six sets; the schema (data card). Not documented: which edition. Choice: the
filtered preference set, the same as for the pairs.
"""

from data_prep.filters import read_messages
from data_prep.records import prompt_record
from data_prep.schema import Prompt
from data_prep.source import Drop, Rejected, Row, Source, each_row


def convert_row(row: Row, drop: Drop) -> list[Prompt]:
    """The conversation without its last answer; `no_answer` if it does not end with one."""
    *prompt, last = read_messages(row, "chosen")
    if last["role"] != "assistant":
        raise Rejected("no_answer")
    return [prompt_record(SOURCE.name, prompt)]


SOURCE = Source(
    name="capybara_prompts",
    kind="prompts",
    hub_id="argilla/Capybara-Preferences-Filtered",
    files="*train*",
    licence="Apache-2.0",
    citation="Argilla, 2024, Capybara-Preferences-Filtered",
    columns=("chosen",),
    convert=each_row(convert_row),
    notes="Confirmed: one of the six sets, schema. Choice: the filtered edition.",
)
