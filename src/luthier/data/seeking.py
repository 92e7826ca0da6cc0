"""The rows of a data set from any place on: what a stream reads, and goes back to when it is resumed.

A cursor goes to a place directly where the format allows it: by the byte in JSON lines and text, by row group in
Parquet, by record batch in Arrow, by the state that `datasets` keeps of its iterables. A CSV file and a JSON list are
read from their beginning up to the place, and nothing of that is tokenized. No file is ever in memory as a whole.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from luthier.data.read import hub_dataset
from luthier.data.readers import parse_line, read_file
from luthier.data.registry import DatasetAttr
from luthier.types import DataError

Place = Any
"""JSON values that say where a cursor stands."""

_BOM = b"\xef\xbb\xbf"
_CHUNK = 1 << 20
_LONGEST = 1 << 28
"""Characters of one row of a JSON list: where more are read without its end, there is none."""


@dataclass(frozen=True, slots=True)
class Unread:
    """A row as it stands in its file: its columns, or the line that holds them, parsed where the row is encoded."""

    place: str
    columns: Any = None
    line: bytes | None = None
    file: str = ""
    number: int = 0

    def parsed(self) -> Mapping[str, Any]:
        """The columns. Raises DataError naming file and line."""
        found = self.columns
        if self.line is not None:
            found = parse_line(Path(self.file), self.number, self.line)
        if not isinstance(found, Mapping):
            raise DataError(f"{self.place}: expected an object with columns, found {type(found).__name__}")
        return found


class Cursor(Protocol):
    """Reads rows one after the other; `place` is that of the row which comes next."""

    def __iter__(self) -> Iterator[Unread]: ...

    def __next__(self) -> Unread: ...

    def place(self) -> Place: ...


def open_cursor(
    attr: DatasetAttr, place: Place = None, *, cache_dir: str | None = None, token: str | None = None
) -> Cursor:
    """A cursor at the beginning of a data set or at a place in it."""
    if attr.load_from == "hub":
        return _HubCursor(attr, place, cache_dir, token)
    return _FileCursor(attr, place)


class _FileCursor(Iterator[Unread]):
    """Rows of the files of a data set in their order; a place is [number of the file, byte, lines or rows before]."""

    def __init__(self, attr: DatasetAttr, place: Place) -> None:
        self._files = attr.files()
        number, byte, rows = place or (0, 0, 0)
        self._number, self._byte, self._rows = int(number), int(byte), int(rows)
        self._inside = self._open() if self._number < len(self._files) else iter(())

    def __next__(self) -> Unread:
        while True:
            try:
                row, self._byte, self._rows = next(self._inside)
            except StopIteration:
                if self._number >= len(self._files) - 1:
                    raise
                self._number, self._byte, self._rows = self._number + 1, 0, 0
                self._inside = self._open()
            else:
                return row

    def place(self) -> Place:
        return [self._number, self._byte, self._rows]

    def _open(self) -> Iterator[tuple[Unread, int, int]]:
        file, byte, rows = self._files[self._number], self._byte, self._rows
        try:
            yield from self._rows_of(file, byte, rows)
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error

    @staticmethod
    def _rows_of(file: Path, byte: int, rows: int) -> Iterator[tuple[Unread, int, int]]:
        kind = file.suffix.lower()
        if kind == ".jsonl" or (kind == ".json" and not _is_list(file)):
            yield from _json_lines(file, byte, rows)
        elif kind == ".txt":
            yield from _text_lines(file, byte, rows)
        else:
            read = {".json": _json_list, ".parquet": _parquet, ".arrow": _arrow}.get(kind, _skipping)
            for number, columns in enumerate(read(file, rows), start=rows):
                placed = columns if isinstance(columns, Unread) else Unread(f"{file}, row {number}", columns)
                yield placed, 0, number + 1


class _HubCursor(Iterator[Unread]):
    """Rows of an iterable of `datasets`; a place is its own state and the rows before."""

    def __init__(self, attr: DatasetAttr, place: Place, cache_dir: str | None, token: str | None) -> None:
        self._attr, self._rows = attr, 0
        self._iterable = hub_dataset(attr, cache_dir, token, streaming=True)
        if place is not None:
            self._rows = place["rows"]
            self._iterable.load_state_dict(copy.deepcopy(place["state"]))
        self._iterator = iter(self._iterable)

    def __next__(self) -> Unread:
        columns = next(self._iterator)
        self._rows += 1
        return Unread(f"{self._attr.path} ({self._attr.split}), row {self._rows - 1}", columns)

    def place(self) -> Place:
        return {"rows": self._rows, "state": self._iterable.state_dict()}


# --------------------------------------------------------------------------------------------------
# Lines


def _json_lines(file: Path, byte: int, lines: int) -> Iterator[tuple[Unread, int, int]]:
    with file.open("rb") as stream:
        stream.seek(byte)
        for line in stream:
            byte, lines = byte + len(line), lines + 1
            line = line.removeprefix(_BOM) if lines == 1 else line
            if lines == 1 and file.suffix.lower() == ".json" and line.strip() == b"{":
                raise DataError(
                    f"{file}: expected a list of rows, or one row on each line; found one object on many lines"
                )
            if line.strip():
                yield Unread(f"{file}, line {lines}", line=line, file=str(file), number=lines), byte, lines


def _text_lines(file: Path, byte: int, lines: int) -> Iterator[tuple[Unread, int, int]]:
    with file.open("rb") as stream:
        stream.seek(byte)
        for whole in stream:
            for line in whole.splitlines(keepends=True):  # a carriage return alone ends a line, too
                byte, lines = byte + len(line), lines + 1
                text = (line.removeprefix(_BOM) if lines == 1 else line).rstrip(b"\r\n")
                place = f"{file}, line {lines}"
                try:
                    columns = {"text": text.decode("utf-8")}
                except UnicodeDecodeError as error:
                    found = text[error.start]
                    raise DataError(
                        f"{place}: not UTF-8 (0x{found:02x}); convert the file to UTF-8"
                    ) from error
                yield Unread(place, columns), byte, lines


# --------------------------------------------------------------------------------------------------
# Rows


def _skipping(file: Path, first: int) -> Iterator[Unread]:
    """From row `first` on, those before read and thrown away."""
    for place, columns in islice(read_file(file), first, None):
        yield Unread(f"{file}, {place}", columns)


def _is_list(file: Path) -> bool:
    """Whether a JSON file begins with a bracket."""
    with file.open("rb") as stream:
        head = stream.read(_CHUNK).removeprefix(_BOM).lstrip()
    return head.startswith(b"[")


def _json_list(file: Path, first: int) -> Iterator[Any]:
    """The rows of a JSON list, of which only a piece is in memory at a time."""
    decode, number = json.JSONDecoder().raw_decode, 0
    try:
        with file.open(encoding="utf-8-sig") as stream:
            text, at = stream.read(_CHUNK), 0
            at = text.index("[") + 1
            while True:
                wrong = "the list has no end"
                at = _after(text, at, " \t\r\n,")
                if at < len(text):
                    if text[at] == "]":
                        return
                    try:
                        row, at = decode(text, at)
                    except json.JSONDecodeError as error:
                        wrong = f"not JSON: {error.msg}"
                        if not _may_go_on(error, text, at):
                            raise DataError(f"{file}, row {number}: {wrong}") from error
                    else:
                        if number >= first:
                            yield row
                        number += 1
                        continue
                if not (more := stream.read(max(_CHUNK, len(text) - at))):
                    raise DataError(f"{file}, row {number}: {wrong}")
                text, at = text[at:] + more, 0
    except UnicodeDecodeError as error:
        raise DataError(f"{file}, after row {number}: not UTF-8; convert the file to UTF-8") from error


def _may_go_on(error: json.JSONDecodeError, text: str, at: int) -> bool:
    """Whether what could not be parsed may only be cut off."""
    cut = error.msg.startswith("Unterminated string") or error.pos >= len(text) - 8  # the middle of \u00e4
    return cut and len(text) - at < _LONGEST


def _after(text: str, at: int, passed: str) -> int:
    while at < len(text) and text[at] in passed:
        at += 1
    return at


def _parquet(file: Path, first: int) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        source = pq.ParquetFile(file)
        for group in range(source.num_row_groups):
            if first >= (rows := source.metadata.row_group(group).num_rows):
                first -= rows
                continue
            for batch in source.iter_batches(batch_size=1000, row_groups=[group]):
                yield from batch.slice(first).to_pylist()
                first = max(0, first - batch.num_rows)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a Parquet file: {_first_line(error)}") from error


def _arrow(file: Path, first: int) -> Iterator[Any]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(file)) as source:
            if source.read(6) == b"ARROW1":
                reader = pa.ipc.open_file(source)
                batches: Iterator[Any] = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                source.seek(0)
                batches = iter(pa.ipc.open_stream(source))
            for batch in batches:
                for start in range(min(first, batch.num_rows), batch.num_rows, 1000):
                    yield from batch.slice(start, 1000).to_pylist()
                first = max(0, first - batch.num_rows)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not an Arrow file: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")
