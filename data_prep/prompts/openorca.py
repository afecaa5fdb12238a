"""OpenOrca: FLAN tasks with a system prompt, a draw from the part that GPT-4 answered.

Schema: `id`, `system_prompt` (may be empty), `question`, `response`.
Rule: the system prompt is folded into the user turn; of all prompts, `limit` are drawn.
Confirmed: one of the six sets; schema and licence (data card). Not documented: how many of its
prompts, millions in all, went into the set of 179,465, and how they were chosen.
Choice: the file of GPT-4's part, and the `limit` prompts with the smallest seeded hash: an even
draw that does not depend on the order of the rows.
"""

import hashlib
from collections.abc import Iterable, Iterator
from heapq import heappush, heappushpop

from data_prep.records import prompt_record
from data_prep.schema import Prompt
from data_prep.source import Drop, Rejected, Row, Source, text


def convert(rows: Iterable[Row], drop: Drop, limit: int, seed: int) -> Iterator[Prompt]:
    """The drawn prompts in the order of the rows; the others are dropped as `not_drawn`."""
    drawn: list[tuple[int, int, Prompt]] = []  # a heap: the largest hash first
    for number, row in enumerate(rows):
        try:
            record = _record(row)
        except Rejected as rejected:
            drop(rejected.reason, row)
            continue
        entry = (-_draw(seed, record["prompt_id"]), number, record)
        if len(drawn) < limit:
            heappush(drawn, entry)
        else:
            drop("not_drawn", heappushpop(drawn, entry)[-1])
    for _, _, record in sorted(drawn, key=lambda entry: entry[1]):
        yield record


def _record(row: Row) -> Prompt:
    system, question = text(row, "system_prompt"), text(row, "question")
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    return prompt_record(SOURCE.name, messages)


def _draw(seed: int, prompt_id: str) -> int:
    digest = hashlib.sha256(f"{seed}|{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


SOURCE = Source(
    name="openorca_prompts",
    kind="prompts",
    hub_id="Open-Orca/OpenOrca",
    files="1M-GPT4-Augmented.parquet",
    licence="MIT",
    citation="Lian et al., 2023, OpenOrca; Mukherjee et al., 2023, arXiv:2306.02707",
    columns=("system_prompt", "question"),
    convert=convert,
    options={"limit": 50_000, "seed": 0},
    notes="Confirmed: one of the six sets, schema, licence. Choice: file and number of prompts.",
)
