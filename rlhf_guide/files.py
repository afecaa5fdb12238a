"""Files that survive a kill: atomic writes, line-by-line appends, hashes, plain disk errors."""

import errno
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .errors import DataError, GuideError

ADVICE = {
    errno.ENOSPC: "the disk is full; free some space and run again, finished stages are kept",
    errno.EDQUOT: "your disk quota is used up; free some space and run again",
    errno.EROFS: "the file system is read-only; choose another folder with run_dir",
    errno.EACCES: "you may not write there; choose another folder with run_dir",
}


def project_root() -> Path:
    """The project's folder: notebooks run in `notebooks/`, commands one level above."""
    here = Path.cwd()
    return here.parent if here.name == "notebooks" else here


@contextmanager
def plain_disk_errors(path: Path | str) -> Iterator[None]:
    """Turn a full disk or a missing permission into a `GuideError` that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in ADVICE:
            raise
        raise GuideError(f"cannot write {path}: {ADVICE[error.errno]}.") from error


def plain(value: Any) -> Any:
    """Any nested value as JSON knows it: numpy to Python, dataclass to dict, NaN to null."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def canonical_hash(value: Any) -> str:
    """sha256 of a value's canonical JSON: equal for equal settings, whatever their order."""
    text = json.dumps(plain(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    with open(path, "rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def write_text(path: Path | str, text: str) -> None:
    """Write a text file atomically: a reader sees the old content or the new, never half."""
    path = Path(path)
    with plain_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as target:
                target.write(text)
                target.flush()
                os.fsync(target.fileno())
            os.chmod(temporary, 0o644)  # mkstemp makes private files
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def write_json(path: Path | str, value: Any) -> None:
    """Write one JSON value atomically, indented for human readers."""
    write_text(path, json.dumps(plain(value), indent=1, ensure_ascii=False) + "\n")


def _line(row: Any) -> str:
    return json.dumps(plain(row), ensure_ascii=False) + "\n"


def write_jsonl(path: Path | str, rows: Iterable[Any]) -> None:
    """Write rows as JSON lines, atomically."""
    write_text(path, "".join(map(_line, rows)))


def append_jsonl(path: Path | str, rows: Iterable[Any]) -> None:
    """Append rows and sync them to the disk; a line that a kill cut short is removed first."""
    path = Path(path)
    with plain_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as target:
            _drop_cut_line(target)
            target.write("".join(map(_line, rows)).encode())
            target.flush()
            os.fsync(target.fileno())


def _drop_cut_line(target: BinaryIO) -> None:
    """Cut a file back to its last complete line."""
    end = target.seek(0, os.SEEK_END)
    if end:
        target.seek(end - 1)
        if target.read(1) != b"\n":
            target.seek(0)
            target.truncate(target.read().rfind(b"\n") + 1)


def read_jsonl(path: Path | str) -> list[Any]:
    """The rows of a JSON lines file; a last line cut short by a kill is left out.

    Raises `DataError` with file and line for any other line that is not JSON.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.split("\n")
    lines.pop()  # empty after a complete last line, else the part of a line that was cut
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path.name}, line {number} is not JSON ({error.msg}); "
                "delete the stage's folder and run its notebook again."
            ) from error
    return rows


def read_json(path: Path | str) -> Any:
    """One JSON value; raises `DataError` naming the file when it is damaged."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged; delete its folder and run again.") from error
