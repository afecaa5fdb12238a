"""SHP: two Reddit comments on one post, ranked by their votes.

Schema: `history` (the post), `human_ref_A/B` (the comments), `score_A/B` (votes), `labels`
(1: A is preferred, 0: B).
Rule: winner's votes / loser's votes > 2, strictly; at most 5 pairs a post; votes become scores.
Confirmed: both numbers (paper, appendix B.1) and the scores (a data card that re-creates the set).
Choice: the first pairs of a post in file order are kept, since the order is not documented; a pair
with a score of zero or less is dropped; a label that contradicts the votes is dropped rather than
turned round.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

from data_prep.filters import user_turn
from data_prep.pairing import one_record
from data_prep.schema import PreferencePair
from data_prep.source import Drop, Rejected, Row, Source, label, number, text


def convert(rows: Iterable[Row], drop: Drop, ratio: float, cap: int) -> Iterator[PreferencePair]:
    """Pairs whose votes differ by a factor above `ratio`, at most `cap` for one post."""
    pairs = Counter()
    for row in rows:
        try:
            record = _record(row, ratio)
            if pairs[record["prompt_id"]] >= cap:
                raise Rejected("over_cap")
        except Rejected as rejected:
            drop(rejected.reason, row)
        else:
            pairs[record["prompt_id"]] += 1
            yield record


def _record(row: Row, ratio: float) -> PreferencePair:
    prompt = user_turn(text(row, "history"))
    scores = number(row, "score_A"), number(row, "score_B")
    answers = text(row, "human_ref_A"), text(row, "human_ref_B")
    winner = 0 if label(row, "labels") == 1 else 1
    if min(scores) <= 0:
        raise Rejected("nonpositive_score")
    high, low = scores[winner], scores[1 - winner]
    record = one_record(SOURCE.name, prompt, answers[winner], answers[1 - winner], (high, low))
    if high <= ratio * low:
        raise Rejected("ratio_not_above")
    return record


SOURCE = Source(
    name="shp",
    kind="preference",
    hub_id="stanfordnlp/SHP",
    files="*train*",
    licence="Reddit terms (early versions of the card say MIT)",
    citation="Ethayarajh et al., 2022, arXiv:2110.08420",
    columns=("history", "human_ref_A", "human_ref_B", "score_A", "score_B", "labels"),
    convert=convert,
    options={"ratio": 2.0, "cap": 5},
    annotator="human",
    paper={
        "prompts": 31003,
        "prompt_tokens": 186.2,
        "chosen_tokens": 173.6,
        "rejected_tokens": 88.8,
        "pairs": 93301,
    },
    notes="Confirmed: ratio above 2, at most 5 pairs a post. Choice: the first 5 in file order.",
)
