"""Build a mixture: raw rows in, Parquet files, counts and a data card out.

    build("mix2", "hub", "data/mix2", workers=2)

Each source is one job and one file, so a killed build resumes by source and the output depends on
the input and the seed only, never on the number of workers. In the output folder:

    data/<source>.parquet     the standard records of `data_prep.schema`
    reports/<source>.json     rows read, records kept, drops by reason, a few dropped rows
    slices/<slice>.parquet    of prompts only: the de-duplicated set, dealt (`data_prep.slices`)
    dropped.csv               the table source, reason, count
    manifest.json             input hashes, options, seed, code version, counts
    README.md                 a data card with the licences of the sources
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from data_prep.card import data_card
from data_prep.mixtures import SOURCES, Mixture, Part, find_mixture
from data_prep.raw import raw_files, read_rows
from data_prep.schema import DataError
from data_prep.slices import prompt_slices
from data_prep.source import Kind, Row, Tally

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SCHEMAS: dict[Kind, pa.Schema] = {
    "preference": pa.schema(
        [
            ("prompt_id", pa.string()),
            ("chosen", _MESSAGES),
            ("rejected", _MESSAGES),
            ("chosen_score", pa.float64()),
            ("rejected_score", pa.float64()),
            ("source", pa.string()),
        ]
    ),
    "sft": pa.schema([("id", pa.string()), ("messages", _MESSAGES), ("source", pa.string())]),
    "prompts": pa.schema(
        [("prompt_id", pa.string()), ("messages", _MESSAGES), ("source", pa.string())]
    ),
}
_RECORDS_A_GROUP = 2000


@dataclass(frozen=True)
class Job:
    """One source of a mixture to convert; it can be sent to another process."""

    part: Part
    files: tuple[Path, ...]
    out: Path
    seed: int

    @property
    def size(self) -> int:
        """Bytes of the raw files."""
        return sum(path.stat().st_size for path in self.files)

    @property
    def data(self) -> Path:
        """The Parquet file."""
        return self.out / "data" / f"{self.part.source}.parquet"

    @property
    def report(self) -> Path:
        """The counts and dropped examples."""
        return self.out / "reports" / f"{self.part.source}.json"


def build(
    mixture: str,
    origin: str,
    out: str | Path,
    workers: int = 1,
    seed: int = 0,
    allow_download: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Build a mixture into a folder and return its manifest.

    `origin` is `embedded`, `hub` or a folder of raw files (`raw.raw_files`). A source without raw
    data is skipped and listed under `missing`. The returned `seconds` by source are not stored:
    equal input gives equal files. Raises DataError for an unknown mixture, an origin with none
    of its sources, and a source whose schema has changed.
    """
    recipe, out = find_mixture(mixture), Path(out)
    jobs, missing = _plan(recipe, origin, out, seed, allow_download)
    for folder in ("data", "reports"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    seconds = _run(jobs, workers, progress)
    reports = [json.loads(job.report.read_text(encoding="utf-8")) for job in jobs]
    manifest = _manifest(recipe, origin, seed, reports, missing)
    if recipe.kind == "prompts":
        reports.append(_deal_slices(jobs, out, seed))
        manifest["slices"] = reports[-1]["slices"]
    manifest["dropped"] = drop_table(reports)
    _write(out / "manifest.json", _json(manifest))
    _write(out / "dropped.csv", _csv(manifest["dropped"]))
    _write(out / "README.md", data_card(manifest))
    return {**manifest, "seconds": seconds}


def convert(
    part: Part | str, origin: str, seed: int = 0, allow_download: bool = False
) -> tuple[list[Row], Tally]:
    """All records of one source in memory, with their counts: for small data and for reading.

    A source without raw data gives no records.
    """
    part = Part(part) if isinstance(part, str) else part
    tally = Tally()
    files = raw_files(SOURCES[part.source], origin, allow_download)
    return list(_records(part, files, seed, tally)), tally


def read_records(path: Path) -> Iterator[Row]:
    """The records of a built Parquet file, in order, a batch in memory at a time."""
    for batch in pq.ParquetFile(path).iter_batches(batch_size=_RECORDS_A_GROUP):
        yield from batch.to_pylist()


def write_records(path: Path, records: Iterable[Row], kind: Kind) -> None:
    """Write standard records as Parquet, atomically."""
    temporary = path.with_suffix(".part")
    schema = SCHEMAS[kind]
    with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        records = iter(records)
        while group := list(islice(records, _RECORDS_A_GROUP)):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
    os.replace(temporary, path)


def code_version() -> str:
    """A hash over the modules of this package: another rule gives another version."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    with open(path, "rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def _plan(
    recipe: Mixture, origin: str, out: Path, seed: int, allow_download: bool
) -> tuple[list[Job], list[str]]:
    """The jobs of the sources that have raw data, and the names of those that have none."""
    found = [
        (part, raw_files(SOURCES[part.source], origin, allow_download)) for part in recipe.parts
    ]
    jobs = [Job(part, tuple(files), out, seed) for part, files in found if files]
    missing = [part.source for part, files in found if not files]
    if not jobs:
        raise DataError(
            f"{origin!r} has no raw data for the mixture {recipe.name}: expected at least one of "
            f"{', '.join(f'{name}.jsonl' for name in missing)} (or .json, .parquet, or a folder "
            "of that name)."
        )
    return jobs, missing


def _run(jobs: list[Job], workers: int, progress: bool) -> dict[str, float]:
    """Convert every source, the largest first; seconds by source."""
    jobs = sorted(jobs, key=lambda job: -job.size)
    seconds = {}
    total = sum(job.size for job in jobs)
    with tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar:
        for job, taken in _results(jobs, min(workers, len(jobs))):
            seconds[job.part.source] = taken
            bar.set_postfix_str(job.part.source, refresh=False)
            bar.update(job.size)
    return seconds


def _results(jobs: list[Job], workers: int) -> Iterator[tuple[Job, float]]:
    if workers <= 1:
        yield from ((job, convert_source(job)) for job in jobs)
        return
    # Fresh interpreters: a forked one may inherit locks of the caller's threads.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(convert_source, job): job for job in jobs}
        try:
            for done in as_completed(running):
                yield running[done], done.result()
        except DataError:
            pool.shutdown(cancel_futures=True)  # what has begun ends and is kept
            raise


def convert_source(job: Job) -> float:
    """Convert one source unless its report says that just this has been done; seconds taken."""
    began = time.perf_counter()
    source, tally = SOURCES[job.part.source], Tally()
    key = {
        "source": source.name,
        "inputs": [{"file": path.name, "sha256": file_hash(path)} for path in job.files],
        "options": _options(job.part, job.seed),
        "limit": job.part.limit,
        "code_version": code_version(),
    }
    if not _is_done(job, key):
        write_records(job.data, _records(job.part, job.files, job.seed, tally), source.kind)
        found = {
            **key,
            "rows_read": tally.read,
            "records": tally.kept,
            "dropped": dict(sorted(tally.dropped.items())),
            "output": file_hash(job.data),
            "examples": dict(sorted(tally.examples.items())),
        }
        _write(job.report, _json(found))
    return time.perf_counter() - began


def _deal_slices(jobs: list[Job], out: Path, seed: int) -> dict[str, Any]:
    """De-duplicate the prompts of all sources and deal them; a report like that of a source."""
    records = [record for job in jobs for record in read_records(job.data)]
    tally = Tally()
    slices = prompt_slices(records, tally.drop, seed)
    (out / "slices").mkdir(exist_ok=True)
    for name, prompts in slices.items():
        write_records(out / "slices" / f"{name}.parquet", prompts, "prompts")
    report = {
        "source": "prompt_set",
        "rows_read": len(records),
        "records": sum(map(len, slices.values())),
        "dropped": dict(sorted(tally.dropped.items())),
        "slices": {name: len(prompts) for name, prompts in slices.items()},
        "examples": dict(sorted(tally.examples.items())),
    }
    _write(out / "reports" / "prompt_set.json", _json(report))
    return report


def _is_done(job: Job, key: dict[str, Any]) -> bool:
    if not (job.report.exists() and job.data.exists()):
        return False
    try:
        found = json.loads(job.report.read_text(encoding="utf-8"))
    except ValueError:
        return False
    same = all(found.get(name) == json.loads(_json(value)) for name, value in key.items())
    return same and found["output"] == file_hash(job.data)


def _records(part: Part, files: Iterable[Path], seed: int, tally: Tally) -> Iterator[Row]:
    """The records of one source, at most `part.limit` of them where it is set."""
    source = SOURCES[part.source]
    rows = read_rows(list(files), tally)
    # `reading` counts the rows that could be read, `read_rows` those that could not.
    for number, record in enumerate(source.records(rows, tally, **_options(part, seed))):
        if part.limit and number >= part.limit:
            tally.kept -= 1
            tally.drop("not_drawn", record)
        else:
            yield record


def _options(part: Part, seed: int) -> dict[str, Any]:
    """All options of the source's converter, with the mixture's changes and the seed."""
    options = {**SOURCES[part.source].options, **part.options}
    return {**options, "seed": seed} if "seed" in options else options


def _manifest(
    recipe: Mixture, origin: str, seed: int, reports: list[dict[str, Any]], missing: list[str]
) -> dict[str, Any]:
    known = ("hub_id", "revision", "licence", "non_commercial", "citation", "paper")
    kept = ("inputs", "options", "limit", "rows_read", "records", "dropped", "output")
    return {
        "mixture": recipe.name,
        "kind": recipe.kind,
        "notes": recipe.notes,
        "origin": origin if origin in ("embedded", "hub") else "folder",
        "seed": seed,
        "code_version": code_version(),
        "records": sum(report["records"] for report in reports),
        "non_commercial": any(SOURCES[report["source"]].non_commercial for report in reports),
        "missing": missing,
        "sources": {
            report["source"]: {
                **{name: getattr(SOURCES[report["source"]], name) for name in known},
                **{name: report[name] for name in kept},
            }
            for report in reports
        },
    }


def drop_table(reports: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table source × reason × count; the rows read and the records kept come first."""
    return [
        {"source": report["source"], "reason": reason, "count": count}
        for report in reports
        for reason, count in (
            ("rows read", report["rows_read"]),
            ("records kept", report["records"]),
            *report["dropped"].items(),
        )
    ]


def _csv(table: list[dict[str, Any]]) -> str:
    lines = [f"{row['source']},{row['reason']},{row['count']}" for row in table]
    return "\n".join(["source,reason,count", *lines]) + "\n"


def _json(value: Any) -> str:
    """Indented JSON in ASCII, so that lone surrogates of dropped rows can be written, too."""
    return json.dumps(value, indent=1, default=str) + "\n"


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(path.suffix + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
