"""Writing the miniature's raw files: what `make_raw_preference` and `make_raw_sft` share."""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from data_prep.source import Row

Makers = Mapping[str, Callable[[], Iterable[Row]]]  # source name: its rows, clean and dirty


def lines_of(name: str, makers: Makers, broken: Mapping[str, list[str]]) -> list[str]:
    """The lines of one source's raw file: its rows as ASCII JSON, then lines that are no rows."""
    return [*map(json.dumps, makers[name]()), *broken.get(name, [])]


def write_files(description: str, makers: Makers, raw_lines: Callable[[str], list[str]]) -> None:
    """Write one JSONL file a source into the folder that the command line names."""
    parser = argparse.ArgumentParser(description=description)
    default = Path(__file__).parent / "embedded" / "raw"
    parser.add_argument("--out", type=Path, default=default, help="folder to write to")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for name in makers:
        (folder / f"{name}.jsonl").write_text("\n".join(raw_lines(name)) + "\n", encoding="ascii")
