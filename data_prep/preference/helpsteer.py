"""HelpSteer: people rated up to four answers to a prompt on five scales from 0 to 4.

Schema: one row an answer: `prompt`, `response`, `helpfulness`, `correctness`, `coherence`,
`complexity`, `verbosity`.
Rule: group the rows by prompt, score each answer, all pairs but ties.
Confirmed: the columns; the mean of helpfulness and correctness for the mixtures of March 2024.
Not documented: the key behind the paper's 37,131 pairs (the March key gave 21,576), so `key` is an
option. The mean of five is offered although more complexity or verbosity is not better.
Choice: prompts in the order of their first row.
"""

from collections.abc import Iterable, Iterator

from data_prep.filters import check_not_empty, user_turn
from data_prep.pairing import Scored, paired_records
from data_prep.schema import DataError, PreferencePair
from data_prep.source import Drop, Rejected, Row, Source, mean, number, text

KEYS = {
    "helpfulness_correctness": ("helpfulness", "correctness"),
    "mean_of_five": ("helpfulness", "correctness", "coherence", "complexity", "verbosity"),
}


def convert(
    rows: Iterable[Row], drop: Drop, key: str, pairs: str, seed: int
) -> Iterator[PreferencePair]:
    """Pairs of the answers to each prompt, ranked by the mean of the aspects of `key`."""
    if key not in KEYS:
        raise DataError(f"{SOURCE.name}: unknown key {key!r}; the keys are {', '.join(KEYS)}")
    for prompt, scored in _by_prompt(rows, drop, KEYS[key]).items():
        messages = user_turn(prompt)
        try:
            yield from paired_records(SOURCE.name, messages, scored, drop, pairs, seed=seed)
        except Rejected as rejected:
            drop(rejected.reason, {"prompt": messages, "answers": scored})


def _by_prompt(
    rows: Iterable[Row], drop: Drop, aspects: tuple[str, ...]
) -> dict[str, list[Scored]]:
    groups: dict[str, list[Scored]] = {}
    for row in rows:
        try:
            prompt = check_not_empty(text(row, "prompt"))
            response = check_not_empty(text(row, "response"))
            score = mean([number(row, aspect) for aspect in aspects])
        except Rejected as rejected:
            drop(rejected.reason, row)
        else:
            groups.setdefault(prompt, []).append((response, score))
    return groups


SOURCE = Source(
    name="helpsteer",
    kind="preference",
    hub_id="nvidia/HelpSteer",
    files="*train*",
    licence="CC-BY-4.0",
    citation="Wang et al., 2023, arXiv:2311.09528",
    columns=("prompt", "response", *KEYS["mean_of_five"]),
    convert=convert,
    options={"key": "helpfulness_correctness", "pairs": "all", "seed": 0},
    annotator="human",
    paper={
        "prompts": 8592,
        "prompt_tokens": 530.0,
        "chosen_tokens": 116.4,
        "rejected_tokens": 89.3,
        "pairs": 37131,
    },
    notes=(
        "Confirmed: columns, all pairs but ties. Not documented: the ranking key of the paper's "
        "37,131 pairs. Not verified: licence."
    ),
)
