"""PKU-SafeRLHF-30K: people compared two answers, once for helpfulness and once for safety.

Schema: `prompt`, `response_0/1`, `is_response_0/1_safe`, `better_response_id`,
`safer_response_id`.
Rule: one pair a row. Confirmed: the columns and the count (26,874 pairs: the whole train split).
Not documented: which of the two ids was used; the paper says the signals were merged. Choice:
`prefer="safer"`, since the set is in the mixture for safety; `prefer="better"` takes the other.
The two disagree on some rows. A safer id that points to the unsafe one of a safe and an unsafe
answer contradicts the flags and is dropped. The licence forbids commercial use.
"""

from data_prep.filters import user_turn
from data_prep.pairing import one_record
from data_prep.schema import DataError, PreferencePair
from data_prep.source import Drop, Rejected, Row, Source, each_row, flag, label, text

_IDS = {"safer": "safer_response_id", "better": "better_response_id"}


def convert_row(row: Row, drop: Drop, prefer: str) -> list[PreferencePair]:
    """The row's two answers, ranked by the safer or the better id, without scores."""
    if prefer not in _IDS:
        raise DataError(f"{SOURCE.name}: prefer is {prefer!r}; use 'safer' or 'better'")
    prompt = user_turn(text(row, "prompt"))
    answers = text(row, "response_0"), text(row, "response_1")
    safe = flag(row, "is_response_0_safe"), flag(row, "is_response_1_safe")
    winner = label(row, _IDS[prefer])
    if prefer == "safer" and safe[1 - winner] and not safe[winner]:
        raise Rejected("label_contradicts_scores")
    return [one_record(SOURCE.name, prompt, answers[winner], answers[1 - winner])]


SOURCE = Source(
    name="pku_saferlhf",
    kind="preference",
    hub_id="PKU-Alignment/PKU-SafeRLHF-30K",
    files="*train*",
    licence="CC-BY-NC-4.0",
    non_commercial=True,
    citation="Ji et al., 2023, arXiv:2307.04657",
    columns=(
        "prompt",
        "response_0",
        "response_1",
        "is_response_0_safe",
        "is_response_1_safe",
        "better_response_id",
        "safer_response_id",
    ),
    convert=each_row(convert_row),
    options={"prefer": "safer"},
    annotator="human",
    paper={
        "prompts": 6975,
        "prompt_tokens": 21.5,
        "chosen_tokens": 70.4,
        "rejected_tokens": 74.6,
        "pairs": 26874,
    },
    notes="Confirmed: columns, licence, whole train split. Not documented: which id ranks.",
)
