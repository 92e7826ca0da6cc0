"""A data set -> raw rows, as plain Python values, in the order of its files; and the hash of its bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from luthier.data.readers import parse_line, read_file, read_lines
from luthier.data.registry import DatasetAttr
from luthier.types import DataError

_HASH_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it stands in the file.

    `index` counts the rows of the data set from 0; `place` names file and row for messages.
    """

    index: int
    place: str
    columns: Mapping[str, Any]

    def parsed(self) -> RawRow:
        return self


@dataclass(frozen=True, slots=True)
class RawLine:
    """A row of a file of JSON lines, its line (counted from 1) not read yet."""

    index: int
    file: Path
    number: int
    line: bytes

    def parsed(self) -> RawRow:
        """The row. Raises DataError naming file and line."""
        place = f"{self.file}, line {self.number}"
        columns = parse_line(self.file, self.number, self.line)
        return RawRow(self.index, place, _object(columns, place))


def read_rows(
    attr: DatasetAttr,
    *,
    max_samples: int | None = None,
    rng: np.random.RandomState | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
) -> Iterator[RawRow]:
    """The rows of a data set in its own order.

    With `attr.num_samples`, that many rows are drawn by `rng`: a random order of all rows, then, if more are
    wanted than there are, further draws with repetition. `max_samples` keeps the first rows of that. Raises
    DataError for files that cannot be parsed (naming file and row), for a data set without rows, and for
    columns that were named in the description and are in no row.
    """
    rows = unread_rows(attr, max_samples=max_samples, rng=rng, cache_dir=cache_dir, token=token)
    return columns_seen((row.parsed() for row in rows), attr)


def unread_rows(
    attr: DatasetAttr,
    *,
    max_samples: int | None = None,
    rng: np.random.RandomState | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
) -> Iterator[RawRow | RawLine]:
    """The rows of `read_rows`, lines of JSON not read yet; that rows and columns are there is left to `SeenColumns`."""
    attr.check_sha1()
    rows = _hub_rows(attr, cache_dir, token) if attr.load_from == "hub" else _file_rows(attr)
    if attr.num_samples is not None:
        rows = _draw(list(rows), attr.num_samples, rng or np.random.RandomState(0))
    return islice(rows, max_samples)


def data_fingerprint(attr: DatasetAttr, cache_dir: str | None = None, token: str | None = None) -> str:
    """SHA-256 of the bytes of the data files in reading order, or the hub data set's own fingerprint."""
    digest = hashlib.sha256()
    if attr.load_from == "hub":
        digest.update(hub_dataset(attr, cache_dir, token)._fingerprint.encode())
    for file in attr.files():
        digest.update(f"{file.suffix}:{file.stat().st_size}:".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(_HASH_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def _draw(
    rows: list[RawRow | RawLine], wanted: int, rng: np.random.RandomState
) -> Iterator[RawRow | RawLine]:
    order = rng.permutation(len(rows))[:wanted]
    if wanted > len(rows) > 0:
        order = np.concatenate((order, rng.choice(len(rows), wanted - len(rows))))
    return (rows[i] for i in order)


class SeenColumns:
    """Which columns rows have, and whether those that the description names are among them."""

    def __init__(self, attr: DatasetAttr) -> None:
        self._attr, self._empty = attr, True
        self.missing = {
            name: column for name, column in attr.columns if column is not None and name in attr.named
        }
        """Columns that were named and in no row so far."""
        self.seen: dict[str, None] = {}
        """Columns of the rows as long as one was missing, in the order in which they came."""

    def add(self, columns: Iterable[str]) -> None:
        """Of a row, or of several."""
        self._empty = False
        if self.missing:
            self.seen |= dict.fromkeys(columns)
            self.missing = {name: column for name, column in self.missing.items() if column not in self.seen}

    def check(self) -> None:
        """Raise DataError where there were no rows, or a column that was named was in none."""
        attr = self._attr
        if self._empty:
            raise DataError(f"data set {attr.name!r}: {attr.path} has no rows")
        if self.missing and self.seen:
            name, column = next(iter(self.missing.items()))
            raise DataError(
                f"data set {attr.name!r}: columns.{name} names {column!r}, which no row of {attr.path} has; "
                f"its columns are {', '.join(self.seen)}"
            )


def columns_seen(rows: Iterable[RawRow], attr: DatasetAttr) -> Iterator[RawRow]:
    """The rows; raises DataError at their end where there were none, or a column that was named was in none."""
    found = SeenColumns(attr)
    for row in rows:
        found.add(row.columns)
        yield row
    found.check()


def _file_rows(attr: DatasetAttr) -> Iterator[RawRow | RawLine]:
    index = 0
    for file in attr.files():
        if file.suffix.lower() == ".jsonl":
            for number, line in read_lines(file):
                yield RawLine(index, file, number, line)
                index += 1
            continue
        for place, columns in read_file(file):
            yield RawRow(index, f"{file}, {place}", _object(columns, f"{file}, {place}"))
            index += 1


def _object(columns: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(columns, Mapping):
        raise DataError(f"{place}: expected an object with columns, found {type(columns).__name__}")
    return columns


def hub_dataset(
    attr: DatasetAttr, cache_dir: str | None, token: str | None, *, streaming: bool = False
) -> Any:
    """A `datasets.Dataset`, or with `streaming` a `datasets.IterableDataset`. Raises DataError if it cannot be had."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_dataset(
            attr.path,
            attr.subset,
            data_dir=attr.folder,
            split=attr.split,
            cache_dir=cache_dir,
            revision=attr.revision,
            token=token,
            **({"streaming": True} if streaming else {}),
        )
    except (DatasetNotFoundError, ValueError, RuntimeError, OSError) as error:
        raise DataError(f"data set {attr.name!r}: cannot load {attr.path!r} from the hub: {error}") from error


def _hub_rows(attr: DatasetAttr, cache_dir: str | None, token: str | None) -> Iterator[RawRow]:
    for index, columns in enumerate(hub_dataset(attr, cache_dir, token)):
        yield RawRow(index, f"{attr.path} ({attr.split}), row {index}", columns)
