"""ShareGPT: conversations with ChatGPT that people shared, long ones split into pieces.

Schema: `id` and `conversations`, turns of `from` (human, gpt, system) and `value`.
Rule: trim both ends of a piece, then the role filter.
Confirmed: the file without refusals ("no_imsorry") is the component of the authors' mixture.
Not verified: schema and licence. Choice: other speakers (bing, bard) are not the assistant that is
imitated here, so their conversations are dropped as `unknown_role`. Trimming keeps pieces that the
published filter alone would drop for an answer at their start.
"""

from data_prep.records import demonstration, read_conversation, trim
from data_prep.schema import Demonstration
from data_prep.source import Drop, Row, Source, each_row


def convert_row(row: Row, drop: Drop) -> list[Demonstration]:
    """The conversation from its first user turn to its last answer."""
    return [demonstration(SOURCE.name, trim(read_conversation(row), drop))]


SOURCE = Source(
    name="sharegpt",
    kind="sft",
    hub_id="anon8231489123/ShareGPT_Vicuna_unfiltered",
    files="ShareGPT_V3_unfiltered_cleaned_split_no_imsorry.json",
    licence="none stated; conversations that users shared",
    citation="ShareGPT, 2023",
    columns=("conversations",),
    convert=each_row(convert_row),
    notes="Confirmed: the file. Not verified: schema, licence. Choice: both ends are trimmed.",
)
