"""Where raw rows come from: the Hub, a local folder, or the miniature that ships with the course.

    files = raw_files(SOURCES["shp"], "/data/raw")     # or "hub", or "embedded"
    for row in read_rows(files, tally): ...

Read are JSON lines, JSON lists and Parquet, the first two also as .gz and .xz. A line or row that
cannot be read is counted in the tally, like any other row that is turned away; a file that cannot
be opened at all is an error.
"""

import fnmatch
import gzip
import json
import lzma
import os
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.schema import DataError
from data_prep.source import Row, Source, Tally

DOWNLOAD_VARIABLE = "RLHF_GUIDE_ALLOW_DOWNLOAD"
FORMATS = (".jsonl", ".json", ".parquet")
_OPENERS: dict[str, Callable[..., BinaryIO]] = {".gz": gzip.open, ".xz": lzma.open}
_ROWS_A_BATCH = 1000  # rows of a Parquet file that are Python objects at one time


def raw_files(source: Source, origin: str, allow_download: bool = False) -> list[Path]:
    """The raw files of a source, sorted; empty when the origin has none of them.

    `origin` is `embedded`, `hub`, or a folder that holds `<name>.jsonl` (.json, .parquet, also
    compressed) or a subfolder `<name>` with any number of such files. Raises DataError for a
    folder that does not exist, and for `hub` when downloads are not allowed or fail.
    """
    if origin == "hub":
        return _download(source, allow_download)
    if origin == "embedded":
        folder = Path(str(package_files("data_prep").joinpath("embedded", "raw")))
    else:
        folder = existing_folder(origin)
    single = [path for path in folder.glob(f"{source.name}.*") if _format(path)]
    return sorted(single) + _readable_below(folder / source.name)


def existing_folder(origin: str) -> Path:
    """The folder of a local origin; raises DataError naming the other origins if there is none."""
    folder = Path(origin).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"there is no folder {origin!r}: the raw data is read from `embedded`, from `hub`, or "
            "from an existing folder with one file or one subfolder for each source."
        )
    return folder


def downloads_allowed() -> bool:
    """Whether the environment allows downloads (RLHF_GUIDE_ALLOW_DOWNLOAD=1)."""
    return os.environ.get(DOWNLOAD_VARIABLE, "").lower() in ("1", "true", "yes")


def read_rows(files: Sequence[Path], tally: Tally) -> Iterator[Row]:
    """The rows of raw files, in order.

    What cannot be read is counted as read and dropped: `invalid_json`, `broken_utf8`, or
    `malformed` for JSON that is no object. Raises DataError naming a file that is damaged.
    """
    for path in files:
        try:
            yield from _READERS[_format(path)](path, tally)
        except (OSError, EOFError, lzma.LZMAError, pa.ArrowInvalid) as error:
            raise DataError(f"{path.name} cannot be read: {error}. Fetch it again.") from error


def _download(source: Source, allow_download: bool) -> list[Path]:
    if not (allow_download or downloads_allowed()):
        raise DataError(
            f"{source.name}: reading {source.hub_id} from the Hub is a download. Allow it with "
            f"--allow-download or {DOWNLOAD_VARIABLE}=1, or give a folder of raw files."
        )
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            source.hub_id,
            repo_type="dataset",
            revision=source.revision,
            allow_patterns=source.files,
        )
    except Exception as error:  # the client raises a dozen unrelated types
        raise DataError(
            f"{source.name}: {source.hub_id} could not be downloaded ({error}). Check the network "
            "and, for a gated set, your Hub token; or give a folder of raw files."
        ) from error
    files = [
        path
        for path in _readable_below(Path(folder))
        if fnmatch.fnmatch(path.relative_to(folder).as_posix(), source.files)
    ]
    if not files:
        raise DataError(
            f"{source.name}: {source.hub_id} ({source.revision}) has no readable file that matches "
            f"{source.files!r}: its layout has changed. Pin an older revision, or give a folder."
        )
    return files


def _readable_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and _format(path))


def _format(path: Path) -> str:
    """The file's format by its name, compression left out; empty when it is none of ours."""
    suffixes = path.suffixes[:-1] if path.suffix in _OPENERS else path.suffixes
    found = suffixes[-1] if suffixes else ""
    compressed_parquet = found == ".parquet" and path.suffix in _OPENERS
    return found if found in FORMATS and not compressed_parquet else ""


def _open(path: Path) -> BinaryIO:
    return _OPENERS.get(path.suffix, open)(path, "rb")


def _read_lines(path: Path, tally: Tally) -> Iterator[Row]:
    with _open(path) as lines:
        for line in lines:
            if line.strip():
                yield from _parsed(line, tally)


def _parsed(line: bytes, tally: Tally) -> Iterator[Row]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        _turn_away(tally, "broken_utf8", repr(line))
    except (ValueError, RecursionError):
        _turn_away(tally, "invalid_json", line.decode("utf-8", "replace"))
    else:
        yield from _objects([row], tally)


def _read_json(path: Path, tally: Tally) -> Iterator[Row]:
    """A JSON list, or, where the file does not begin with a bracket, JSON lines."""
    with _open(path) as source:
        if source.read(1000).lstrip()[:1] != b"[":
            yield from _read_lines(path, tally)
            return
        source.seek(0)
        try:
            rows = json.loads(source.read().decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path.name} is not JSON: {error}. Fetch it again.") from error
    yield from _objects(rows, tally)


def _read_parquet(path: Path, tally: Tally) -> Iterator[Row]:
    for batch in pq.ParquetFile(path).iter_batches(batch_size=_ROWS_A_BATCH):
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError:
            rows = _row_by_row(batch, tally)
        yield from rows


def _row_by_row(batch: pa.RecordBatch, tally: Tally) -> Iterator[Row]:
    for index in range(batch.num_rows):
        try:
            (row,) = batch.slice(index, 1).to_pylist()
        except UnicodeDecodeError as error:
            _turn_away(tally, "broken_utf8", repr(error.object))
        else:
            yield row


def _objects(rows: list[Any], tally: Tally) -> Iterator[Row]:
    for row in rows:
        if isinstance(row, dict):
            yield row
        else:
            _turn_away(tally, "malformed", row)


def _turn_away(tally: Tally, reason: str, what: Any) -> None:
    tally.read += 1
    tally.drop(reason, what)


_READERS = {".jsonl": _read_lines, ".json": _read_json, ".parquet": _read_parquet}
