"""Data files -> raw rows, as plain Python values, in the order of the file.

JSON is parsed by the standard library rather than inferred into Arrow types: a column may hold texts in one
row and objects in the next, and a text that looks like a date stays a text. CSV cells are always texts.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.data.registry import DatasetAttr
from luthier.types import DataError

if TYPE_CHECKING:
    import datasets

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
    DataError for files that cannot be parsed (naming file and row) and for columns that were named in the
    description and are in no row.
    """
    attr.check_sha1()
    rows = _hub_rows(attr, cache_dir, token) if attr.load_from == "hub" else _file_rows(attr)
    if attr.num_samples is not None:
        rows = _draw(list(rows), attr.num_samples, rng or np.random.RandomState(0))
    return _columns_seen(islice(rows, max_samples), attr)


def data_fingerprint(attr: DatasetAttr, cache_dir: str | None = None, token: str | None = None) -> str:
    """SHA-256 of the bytes of the data files in reading order, or the hub data set's own fingerprint."""
    digest = hashlib.sha256()
    if attr.load_from == "hub":
        digest.update(_hub_dataset(attr, cache_dir, token)._fingerprint.encode())
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


def _columns_seen(rows: Iterable[RawRow], attr: DatasetAttr) -> Iterator[RawRow]:
    missing = {name: column for name, column in attr.columns if column is not None and name in attr.named}
    seen: dict[str, None] = {}
    for row in rows:
        if missing:
            seen |= dict.fromkeys(row.columns)
            missing = {name: column for name, column in missing.items() if column not in row.columns}
        yield row
    if missing and seen:
        name, column = next(iter(missing.items()))
        raise DataError(
            f"data set {attr.name!r}: columns.{name} names {column!r}, which no row of {attr.path} has; "
            f"its columns are {', '.join(seen)}"
        )


def _file_rows(attr: DatasetAttr) -> Iterator[RawRow]:
    index = 0
    for file in attr.files():
        try:
            for place, columns in _READERS[file.suffix.lower()](file):
                if not isinstance(columns, Mapping):
                    raise DataError(
                        f"{file}, {place}: expected an object with columns, found {type(columns).__name__}"
                    )
                yield RawRow(index, f"{file}, {place}", columns)
                index += 1
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from error


def _read_json(file: Path) -> Iterator[tuple[str, Any]]:
    text = file.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        return _parse_lines(file, text.split("\n"))
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}"
        ) from error
    return ((f"row {i}", row) for i, row in enumerate(rows))


def _read_jsonl(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open(encoding="utf-8-sig", newline="\n") as stream:
        yield from _parse_lines(file, stream)


def _parse_lines(file: Path, lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{file}, line {number}: not JSON: {error.msg} at column {error.colno}"
            ) from error


def _read_csv(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, restkey="")
        for row in reader:
            if "" in row:
                raise DataError(
                    f"{file}, line {reader.line_num}: more cells than the {len(row) - 1} columns of its head"
                )
            yield f"line {reader.line_num}", row


def _read_txt(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            yield f"line {number}", {"text": line.rstrip("\n")}


def _read_parquet(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        batches = pq.ParquetFile(file).iter_batches(batch_size=1000)
        yield from _number(row for batch in batches for row in batch.to_pylist())
    except pa.ArrowInvalid as error:
        raise DataError(f"{file}: not a Parquet file: {error}") from error


def _read_arrow(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa

    with pa.memory_map(str(file)) as source:
        try:
            if source.read(6) == b"ARROW1":
                table = pa.ipc.open_file(source).read_all()
            else:
                source.seek(0)
                table = pa.ipc.open_stream(source).read_all()
        except pa.ArrowInvalid as error:
            raise DataError(f"{file}: not an Arrow file: {error}") from error
        yield from _number(row for batch in table.to_batches(1000) for row in batch.to_pylist())


def _number(rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"row {i}", row) for i, row in enumerate(rows))


_READERS = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".txt": _read_txt,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}


def _hub_dataset(attr: DatasetAttr, cache_dir: str | None, token: str | None) -> datasets.Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        dataset = load_dataset(
            attr.path, attr.subset, data_dir=attr.folder, split=attr.split, cache_dir=cache_dir, token=token
        )
    except (DatasetNotFoundError, ValueError, RuntimeError, ConnectionError) as error:
        raise DataError(f"data set {attr.name!r}: cannot load {attr.path!r} from the hub: {error}") from error
    return dataset


def _hub_rows(attr: DatasetAttr, cache_dir: str | None, token: str | None) -> Iterator[RawRow]:
    for index, columns in enumerate(_hub_dataset(attr, cache_dir, token)):
        yield RawRow(index, f"{attr.path} ({attr.split}), row {index}", columns)
