"""The tables of the course for a data source: the miniature, a folder of raw files, or the Hub.

    found = course_data("/data/raw", seed=42, out="runs/cpu/data/build")
    found.tables["preference_train"]

The embedded tables are the miniature's splits with simulated annotators, the others mixture `mix2`,
the SFT mixture and the prompt set, converted and split by a hash of the prompt, so that a prompt
lies on the same side in every source and every run.
"""

import heapq
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep import embedded
from data_prep.build import build, read_records
from data_prep.contamination import EvaluationIndex
from data_prep.ngrams import prompt_text
from data_prep.pairing import seeded
from data_prep.schema import DataError
from data_prep.source import Row, Tally

PROMPT_SPLITS = ("online_1", "online_2", "online_3", "validation", "evaluation")
MIXTURES = {"preference": "mix2", "sft": "sft", "prompts": "prompts"}
HELD_OUT_SHARE = 0.1  # of the prompts of preference pairs
HELD_OUT_PAIRS = 2000  # at most

Utility = Callable[[Row, str, str], float]
Prefer = Callable[[Row, Row, str], bool]


@dataclass(frozen=True)
class CourseData:
    """The chain's tables by name, and what became of every raw row.

    tables: `sft`, `preference_train`, `preference_heldout` and `prompts_<split>` for each of
        `PROMPT_SPLITS`.
    dropped: rows of source, reason, count; `rows read` and `records kept` among the reasons.
    examples: a few dropped rows: source, reason, row (as JSON in ASCII).
    missing: sources that the folder does not have.
    """

    tables: dict[str, list[Row]]
    dropped: list[dict[str, Any]] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def course_data(
    data_source: str,
    seed: int,
    utility: Utility,
    prefer: Prefer,
    out: str | Path,
    max_rows: int = 0,
    allow_download: bool = False,
) -> CourseData:
    """The tables for `embedded`, `hub` or a folder of raw files.

    `utility` and `prefer` simulate the miniature's annotators (`embedded.build_pairs`) and are not
    used for real data. `out` is a folder for the converted sources, which a later call takes up.
    `max_rows` bounds demonstrations and training pairs, drawn by hash; 0 takes all. Raises
    DataError when a folder has no source of a kind that is needed, or too few rows are left.
    """
    if data_source == "embedded":
        return CourseData(_embedded_tables(seed, utility, prefer))
    built = {
        kind: build(mixture, data_source, Path(out) / mixture, 1, seed, allow_download, False)
        for kind, mixture in MIXTURES.items()
    }
    tally = Tally()
    tables = _real_tables(Path(out), built, seed, max_rows, tally)
    reports = [_report(path) for path in sorted(Path(out).glob("*/reports/*.json"))]
    course = [("course", reason, count) for reason, count in sorted(tally.dropped.items())]
    return CourseData(
        tables,
        [row for manifest in built.values() for row in manifest["dropped"]]
        + [dict(zip(("source", "reason", "count"), row, strict=True)) for row in course],
        [example for report in reports for example in _examples(report)],
        [name for manifest in built.values() for name in manifest["missing"]],
    )


def source_key(data_source: str) -> dict[str, Any]:
    """What a stage must remember of its raw data besides the name: a folder's files and sizes."""
    if data_source in ("embedded", "hub"):
        return {}
    folder = Path(data_source)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {"files": [[path.relative_to(folder).as_posix(), path.stat().st_size] for path in files]}


def _embedded_tables(seed: int, utility: Utility, prefer: Prefer) -> dict[str, list[Row]]:
    pairs = {
        split: embedded.build_pairs(split, utility, prefer)[0]
        for split in ("preference_train", "preference_heldout")
    }
    prompts = {f"prompts_{split}": embedded.load_prompts(split) for split in PROMPT_SPLITS}
    return {"sft": embedded.load_demonstrations(), **pairs, **prompts}


def _real_tables(
    out: Path, built: dict[str, dict[str, Any]], seed: int, max_rows: int, tally: Tally
) -> dict[str, list[Row]]:
    slices = out / MIXTURES["prompts"] / "slices"
    prompts = {
        f"prompts_{split}": list(read_records(slices / f"{split}.parquet"))
        for split in PROMPT_SPLITS
    }
    index = EvaluationIndex(prompts["prompts_evaluation"])
    pairs, demonstrations = (
        _clean(_all_records(out / MIXTURES[kind], built[kind]), index, tally)
        for kind in ("preference", "sft")
    )
    train, held_out = _split(pairs, seed, max_rows, tally)
    tables = {
        "sft": _draw(demonstrations, seed, max_rows, tally),
        "preference_train": train,
        "preference_heldout": held_out,
        **prompts,
    }
    if empty := [name for name, rows in tables.items() if not rows]:
        raise DataError(
            f"the raw data leaves nothing for the table {empty[0]!r}: add rows or sources. "
            "What was dropped, and why, is in dropped.csv of each built mixture."
        )
    return tables


def _all_records(folder: Path, manifest: dict[str, Any]) -> Iterator[Row]:
    for name in manifest["sources"]:
        yield from read_records(folder / "data" / f"{name}.parquet")


def _clean(records: Iterable[Row], index: EvaluationIndex, tally: Tally) -> Iterator[Row]:
    """The records whose prompt shares no run of words with an evaluation prompt."""
    for record in records:
        messages = record.get("chosen") or record["messages"]
        if index.contaminated(prompt_text(messages[:-1])) is None:
            yield record
        else:
            tally.drop("contaminated", record)


def _split(
    pairs: Iterable[Row], seed: int, max_rows: int, tally: Tally
) -> tuple[list[Row], list[Row]]:
    """Pairs to train on and pairs held out; the hash of the prompt alone decides."""
    sides: tuple[list[Row], list[Row]] = ([], [])
    for pair in pairs:
        sides[_share("held out", pair) < HELD_OUT_SHARE].append(pair)
    return _draw(sides[0], seed, max_rows, tally), _draw(sides[1], seed, HELD_OUT_PAIRS, tally)


def _draw(records: Iterable[Row], seed: int, limit: int, tally: Tally) -> list[Row]:
    """At most `limit` records in the order of a seeded hash: a shuffle of all sources."""
    ordered = [(_share(seed, record), number, record) for number, record in enumerate(records)]
    drawn = heapq.nsmallest(limit or len(ordered), ordered)
    for _ in range(len(ordered) - len(drawn)):
        tally.drop("not_drawn", None)
    return [record for _, _, record in drawn]


def _share(key: Any, record: Row) -> float:
    """A number in [0, 1) that depends on the key and the prompt's hash, not on its source."""
    name = record.get("prompt_id") or record["id"]
    return seeded(key, name.rsplit("-", 1)[1]).random()


def _report(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _examples(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"source": report["source"], "reason": reason, "row": json.dumps(row)}
        for reason, rows in report["examples"].items()
        for row in rows
    ]
