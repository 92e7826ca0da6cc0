"""A data set -> raw rows, as plain Python values, in the order of its files; and the hash of its bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from luthier.data.readers import read_file
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
    attr.check_sha1()
    rows = _hub_rows(attr, cache_dir, token) if attr.load_from == "hub" else _file_rows(attr)
    if attr.num_samples is not None:
        rows = _draw(list(rows), attr.num_samples, rng or np.random.RandomState(0))
    return columns_seen(islice(rows, max_samples), attr)


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


def _draw(rows: list[RawRow], wanted: int, rng: np.random.RandomState) -> Iterator[RawRow]:
    order = rng.permutation(len(rows))[:wanted]
    if wanted > len(rows) > 0:
        order = np.concatenate((order, rng.choice(len(rows), wanted - len(rows))))
    return (rows[i] for i in order)


def columns_seen(rows: Iterable[RawRow], attr: DatasetAttr) -> Iterator[RawRow]:
    """The rows; raises DataError at their end where there were none, or a column that was named was in none."""
    missing = {name: column for name, column in attr.columns if column is not None and name in attr.named}
    seen: dict[str, None] = {}
    empty = True
    for row in rows:
        empty = False
        if missing:
            seen |= dict.fromkeys(row.columns)
            missing = {name: column for name, column in missing.items() if column not in row.columns}
        yield row
    if empty:
        raise DataError(f"data set {attr.name!r}: {attr.path} has no rows")
    if missing and seen:
        name, column = next(iter(missing.items()))
        raise DataError(
            f"data set {attr.name!r}: columns.{name} names {column!r}, which no row of {attr.path} has; "
            f"its columns are {', '.join(seen)}"
        )


def _file_rows(attr: DatasetAttr) -> Iterator[RawRow]:
    index = 0
    for file in attr.files():
        for place, columns in read_file(file):
            if not isinstance(columns, Mapping):
                raise DataError(
                    f"{file}, {place}: expected an object with columns, found {type(columns).__name__}"
                )
            yield RawRow(index, f"{file}, {place}", columns)
            index += 1


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
