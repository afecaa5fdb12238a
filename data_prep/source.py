"""What a raw data source is: its origin, its schema, and how its rows become standard records.

Every module of `data_prep.preference`, `data_prep.sft` and `data_prep.prompts` defines one
`Source`. Its `convert` function reads raw rows in the upstream schema and yields standard records;
what it cannot use it hands to `drop` with a reason code of `data_prep.filters.REASONS`, so that
the rows read are always accounted for.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from data_prep.schema import DataError

Row = dict[str, Any]
Drop = Callable[[str, Any], None]  # drop(reason, what was dropped)
Kind = Literal["preference", "sft", "prompts"]


class Rejected(Exception):
    """A raw row, or one candidate of it, that a filter turns away; `reason` is its code."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Source:
    """One public data set: where it lives, under which terms, and how it is converted.

    name: the short name used in mixtures and records (`source` field).
    hub_id, revision, files: Hub repository, git revision and glob of the data files in it.
    columns: columns that the raw schema must have; a missing one is reported by name.
    convert: `convert(rows, drop, **options)` yields standard records in the order of the rows.
    options: the converter's keyword arguments with their defaults.
    annotator: who ranked the answers (paper, Table 5); empty for demonstrations and prompts.
    paper: published counts, for example `{"pairs": 115396}`; empty where none is published.
    notes: what is confirmed and what is a choice of this guide.
    """

    name: str
    kind: Kind
    hub_id: str
    licence: str
    citation: str
    columns: tuple[str, ...]
    convert: Callable[..., Iterator[Row]]
    revision: str = "main"
    files: str = "**"
    options: dict[str, Any] = field(default_factory=dict)
    non_commercial: bool = False
    annotator: str = ""
    paper: dict[str, float] = field(default_factory=dict)
    notes: str = ""

    def records(self, rows: Iterable[Row], tally: "Tally", **options: Any) -> Iterator[Row]:
        """Convert rows, counting in `tally` what was read, kept and dropped.

        Raises DataError for an unknown option and, naming it, for a missing column.
        """
        unknown = sorted(set(options) - set(self.options))
        if unknown:
            known = ", ".join(self.options) or "none"
            raise DataError(f"{self.name} has no option {unknown[0]!r}; its options: {known}")
        read = tally.reading(self._checked(rows))
        for record in self.convert(read, tally.drop, **{**self.options, **options}):
            tally.kept += 1
            yield record

    def _checked(self, rows: Iterable[Row]) -> Iterator[Row]:
        checked = False
        for row in rows:
            if not checked and isinstance(row, dict):
                self._check_columns(row)
                checked = True
            yield row

    def _check_columns(self, row: Row) -> None:
        missing = [column for column in self.columns if column not in row]
        if missing:
            raise DataError(
                f"{self.name}: the raw data has no column {missing[0]!r}. Expected "
                f"{', '.join(self.columns)}; found {', '.join(map(str, row))}. Has the schema "
                f"of {self.hub_id} changed? Pin an older revision, or adapt the converter."
            )


@dataclass
class Tally:
    """Counts of one source's conversion, and up to `keep` dropped examples for each reason."""

    keep: int = 3
    read: int = 0
    kept: int = 0
    dropped: Counter = field(default_factory=Counter)
    examples: dict[str, list[Any]] = field(default_factory=dict)

    def reading(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Pass rows through and count them."""
        for row in rows:
            self.read += 1
            yield row

    def drop(self, reason: str, what: Any) -> None:
        """Count one drop and keep the first few of each reason for reading."""
        self.dropped[reason] += 1
        seen = self.examples.setdefault(reason, [])
        if len(seen) < self.keep:
            seen.append(what)


def each_row(convert_row: Callable[..., Iterable[Row]]) -> Callable[..., Iterator[Row]]:
    """Make a converter of rows from a function of one row that may raise `Rejected`.

    `convert_row(row, drop, **options)` returns the records of one row. It may drop single
    candidates itself and raise `Rejected` to turn the whole row away.
    """

    def convert(rows: Iterable[Row], drop: Drop, **options: Any) -> Iterator[Row]:
        for row in rows:
            try:
                records = list(convert_row(row, drop, **options))
            except Rejected as rejected:
                drop(rejected.reason, row)
            else:
                yield from records

    return convert


def text(row: Any, key: Any) -> str:
    """A string field; raises `Rejected` with `wrong_type` for anything else, or invalid unicode."""
    value = _get(row, key)
    if not isinstance(value, str):
        raise Rejected("wrong_type")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # lone surrogates: JSON allows them, Parquet does not
        raise Rejected("broken_utf8") from error
    return value


def items(row: Any, key: Any) -> list[Any]:
    """A non-empty list field (tuples and arrays count); raises `Rejected` otherwise."""
    value = _get(row, key)
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, list | tuple):
        raise Rejected("wrong_type")
    if not value:
        raise Rejected("empty_list")
    return list(value)


def mapping(row: Any, key: Any) -> dict[Any, Any]:
    """A field that holds an object; raises `Rejected` with `wrong_type` for anything else."""
    value = _get(row, key)
    if not isinstance(value, dict):
        raise Rejected("wrong_type")
    return value


def flag(row: Any, key: Any) -> bool:
    """A true or false field; raises `Rejected` with `wrong_type` for anything else."""
    value = _get(row, key)
    if not isinstance(value, bool):
        raise Rejected("wrong_type")
    return value


def label(row: Any, key: Any) -> int:
    """A label that is 0 or 1; raises `Rejected` as `number` does, and with `malformed`."""
    value = number(row, key)
    if value not in (0, 1):
        raise Rejected("malformed")
    return int(value)


def number(row: Any, key: Any) -> float:
    """A finite number, also when it is written as text ("4", " 3.5 ").

    Raises `Rejected` with `missing_rating` for None, "N/A", other text, NaN and infinities, and
    with `wrong_type` for booleans and everything else.
    """
    value = _get(row, key)
    if value is None:
        raise Rejected("missing_rating")
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise Rejected("wrong_type")
    try:
        value = float(value)
    except (ValueError, OverflowError) as error:
        raise Rejected("missing_rating") from error
    if not math.isfinite(value):
        raise Rejected("missing_rating")
    return value


def mean(values: list[float]) -> float:
    """The mean of some ratings; raises `Rejected` with `malformed` if it overflows."""
    value = sum(values) / len(values)
    if not math.isfinite(value):
        raise Rejected("malformed")
    return value


def _get(row: Any, key: Any) -> Any:
    if isinstance(row, dict):
        return row.get(key)
    raise Rejected("wrong_type")
