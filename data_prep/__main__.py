"""The command line: list the sources and mixtures, and build a mixture.

python -m data_prep sources --json
python -m data_prep build --mixture mix2 --from embedded --out data/mix2 --workers 2
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_prep.build import build, read_records
from data_prep.mixtures import MIXTURES, SOURCES
from data_prep.schema import DataError
from data_prep.statistics import source_statistics


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 1 for data that cannot be used, with a message that says why."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_prep", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    sources = commands.add_parser("sources", help="list all sources and mixtures")
    sources.add_argument("--json", action="store_true", help="as one JSON object")
    sources.set_defaults(run=_list)
    command = commands.add_parser("build", help="build a mixture into a folder")
    command.add_argument("--mixture", required=True, metavar="NAME", help=", ".join(MIXTURES))
    command.add_argument(
        "--from",
        dest="origin",
        required=True,
        metavar="ORIGIN",
        help="embedded, hub, or a folder with one file or subfolder for each source",
    )
    command.add_argument("--out", required=True, metavar="DIR", help="the folder to write to")
    command.add_argument("--workers", type=_positive, default=1, help="processes (default: 1)")
    command.add_argument("--seed", type=int, default=0, help="for the random pair rules")
    command.add_argument("--allow-download", action="store_true", help="needed for --from hub")
    command.add_argument("--push", metavar="REPO", help="upload the result to this Hub repository")
    command.set_defaults(run=_build)
    table = commands.add_parser("statistics", help="Table 5 of a built preference mixture")
    table.add_argument("folder", help="the folder that build wrote")
    table.add_argument(
        "--tokenizer", metavar="MODEL", help="folder or Hub id; words are counted without it"
    )
    table.add_argument("--json", action="store_true", help="with turn counts and histograms")
    table.set_defaults(run=_statistics)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _list(options: argparse.Namespace) -> None:
    listed = catalogue()
    if options.json:
        print(json.dumps(listed, indent=1))
        return
    for name, source in listed["sources"].items():
        flag = " (non-commercial)" if source["non_commercial"] else ""
        print(f"{source['kind']:10}  {name:22}  {source['hub_id']}, {source['licence']}{flag}")
    print()
    for name, mixture in listed["mixtures"].items():
        print(f"{name:16}  {', '.join(part['source'] for part in mixture['parts'])}")


def catalogue() -> dict[str, Any]:
    """Every source and every mixture, as JSON knows it."""
    fields = (
        "kind",
        "hub_id",
        "revision",
        "files",
        "licence",
        "non_commercial",
        "citation",
        "columns",
        "options",
        "annotator",
        "paper",
        "notes",
    )
    return {
        "sources": {
            name: {field: getattr(source, field) for field in fields}
            for name, source in SOURCES.items()
        },
        "mixtures": {
            name: {
                "kind": mixture.kind,
                "parts": [vars(part) for part in mixture.parts],
                "notes": mixture.notes,
            }
            for name, mixture in MIXTURES.items()
        },
    }


def _build(options: argparse.Namespace) -> None:
    manifest = build(
        options.mixture,
        options.origin,
        options.out,
        options.workers,
        options.seed,
        options.allow_download,
    )
    for row in manifest["dropped"]:
        print(f"{row['source']:22}  {row['reason']:26}  {row['count']:>9,}")
    for name in manifest["missing"]:
        print(f"{name:22}  no raw data: skipped")
    if manifest["non_commercial"]:
        print("This mixture holds sources that may not be used commercially; see README.md.")
    if options.push:
        _push(options.out, options.push)
    print(f"{manifest['records']:,} records in {options.out}")


def _statistics(options: argparse.Namespace) -> None:
    files = sorted(Path(options.folder, "data").glob("*.parquet"))
    if not files or SOURCES[files[0].stem].kind != "preference":
        raise DataError(f"{options.folder} holds no built preference mixture; run build first.")
    count_tokens = _tokenizer(options.tokenizer)
    found = {
        path.stem: source_statistics(pairs, count_tokens)
        for path in files
        if (pairs := list(read_records(path)))
    }
    if options.json:
        print(json.dumps(found, indent=1))
        return
    columns = ("prompts", "prompt_tokens", "chosen_tokens", "rejected_tokens", "pairs")
    shown = (*columns, "longer_chosen")
    print(f"{'':20}" + "".join(f"{name:>17}" for name in (*shown, "annotator")))
    for name, row in found.items():
        numbers = [row[column] for column in shown]
        cells = [f"{n:,}" if isinstance(n, int) else f"{n:.2f}" for n in numbers]
        cells.append(SOURCES[name].annotator)
        print(f"{name:20}" + "".join(f"{cell:>17}" for cell in cells))


def _tokenizer(name: str | None) -> Callable[[str], int]:
    """The number of tokens of a text for a tokenizer, or of words without one."""
    if name is None:
        return lambda text: len(text.split())
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise DataError(f"there is no tokenizer {name!r}: {error}") from error
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


def _push(folder: str, repository: str) -> None:
    """Upload a built folder with its data card; the token comes from the Hub client's login."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, repo_type="dataset", exist_ok=True)
        api.upload_folder(
            folder_path=folder,
            repo_id=repository,
            repo_type="dataset",
            ignore_patterns=["reports/*", "*.part"],  # reports quote dropped rows
        )
    except Exception as error:  # the client raises a dozen unrelated types
        raise DataError(
            f"{repository} could not be written: {error}. The result is kept in {folder}; log in "
            "with `hf auth login`, check the name, and give the same command again."
        ) from error


if __name__ == "__main__":
    sys.exit(main())
