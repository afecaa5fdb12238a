"""Summarize-from-feedback (comparisons): people compared two summaries of a Reddit post.

Schema: `info` (`post`, `title`, `subreddit`), `summaries` (two, each with `text`), `choice` (0 or
1: the index of the better one).
Rule: one pair a row. Part of mix1 only; the paper gives no counts. The schema is general knowledge
and not verified. Choice: the wording of the prompt; a post without a title is used without one.
"""

from data_prep.filters import check_not_empty, user_turn
from data_prep.pairing import one_record
from data_prep.schema import PreferencePair
from data_prep.source import Drop, Rejected, Row, Source, each_row, items, label, mapping, text


def convert_row(row: Row, drop: Drop) -> list[PreferencePair]:
    """The row's two summaries, ranked by the choice, without scores."""
    info = mapping(row, "info")
    post = check_not_empty(text(info, "post"))
    title = text(info, "title") if info.get("title") is not None else ""
    headed = f"{title}\n\n{post}" if title.strip() else post
    summaries = items(row, "summaries")
    if len(summaries) != 2:
        raise Rejected("length_mismatch")
    winner = label(row, "choice")
    chosen, rejected = (text(summaries[i], "text").strip() for i in (winner, 1 - winner))
    prompt = user_turn(f"Summarize this post in a few sentences.\n\n{headed}")
    return [one_record(SOURCE.name, prompt, chosen, rejected)]


SOURCE = Source(
    name="summarize",
    kind="preference",
    hub_id="openai/summarize_from_feedback",
    files="comparisons/*train*",
    licence="not stated; the posts are under Reddit's terms",
    citation="Stiennon et al., 2020, arXiv:2009.01325",
    columns=("info", "summaries", "choice"),
    convert=each_row(convert_row),
    annotator="human",
    notes="Not verified: schema and licence. Choice: the wording of the prompt.",
)
