"""HH-RLHF, helpful part: people compared two answers of a language model to a conversation.

Schema: `chosen` and `rejected`, each a whole transcript with speakers' markers.
Rule: both transcripts become messages and must pass the six rules of the standard format.
Confirmed: the three helpful folders, 115,547 rows before and 115,396 after the six rules (blog,
data card, paper). Choice: white space around a turn is removed; a transcript that ends in a marker
is named `trailing_marker` instead of `empty_turn`.
"""

from data_prep.filters import prompt_id
from data_prep.schema import PreferencePair, pair_problem
from data_prep.source import Drop, Rejected, Row, Source, each_row, text
from data_prep.transcript import read_transcript


def convert_row(row: Row, drop: Drop) -> list[PreferencePair]:
    """One pair of transcripts as one record, without scores."""
    pair = {key: read_transcript(text(row, key)) for key in ("chosen", "rejected")}
    problem = pair_problem(pair)
    if problem:
        raise Rejected(problem)
    name = prompt_id(SOURCE.name, pair["chosen"][:-1])
    scores = {"chosen_score": None, "rejected_score": None}
    return [{"prompt_id": name, **pair, **scores, "source": SOURCE.name}]


SOURCE = Source(
    name="hh_rlhf",
    kind="preference",
    hub_id="Anthropic/hh-rlhf",
    files="helpful-*/train*",
    licence="MIT",
    citation="Bai et al., 2022, arXiv:2204.05862",
    columns=("chosen", "rejected"),
    convert=each_row(convert_row),
    annotator="human",
    paper={
        "prompts": 115092,
        "prompt_tokens": 160.4,
        "chosen_tokens": 82.2,
        "rejected_tokens": 73.6,
        "pairs": 115396,
    },
    notes=(
        "Confirmed: helpful-base, helpful-online and helpful-rejection-sampled, six rules. "
        "Not verified: licence."
    ),
)
