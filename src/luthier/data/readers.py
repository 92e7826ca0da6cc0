"""One data file -> (place, row), in the order of the file; what is wrong with a file, named by line or row.

JSON is parsed by the standard library rather than inferred into Arrow types: a column may hold texts in one
row and objects in the next, and a text that looks like a date stays a text. CSV cells are always texts.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from luthier.types import DataError

Placed = tuple[str, Any]
"""Where in its file a row stands ("line 3", "row 2"), and the row as a plain Python value."""

_HEAD = 4096
_CHUNK = 1 << 20
_CELL = 2**31 - 1  # the csv module refuses cells over 128 KiB otherwise

_SIGNATURES = (
    (b"\x1f\x8b", "a gzip archive"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"SQLite format 3", "an SQLite database"),
    (b"GGUF", "a GGUF model"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"%PDF", "a PDF document"),
    (b"\xff\xfe", "UTF-16 text"),
    (b"\xfe\xff", "UTF-16 text"),
    (b"version https://git-lfs", "a Git LFS pointer to a file that was not downloaded (git lfs pull)"),
    (b"<!DOCTYPE html", "an HTML page"),
    (b"<!doctype html", "an HTML page"),
    (b"<html", "an HTML page"),
)


def read_file(file: Path) -> Iterator[Placed]:
    """The rows of a file of a known type. Raises DataError naming file and line or row."""
    try:
        yield from _READERS[file.suffix.lower()](file)
    except UnicodeDecodeError as error:
        raise _not_utf8(file) from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error


def _recognised(file: Path) -> str | None:
    """What the file is by its first bytes, if it is nothing that holds rows of text."""
    with file.open("rb") as stream:
        head = stream.read(_HEAD)
    for signature, kind in _SIGNATURES:
        if head.startswith(signature):
            return kind
    if head[8:10] == b'{"' and b"\0" in head[:8]:
        return "a safetensors file"
    return "a binary file" if b"\0" in head else None


def _not_utf8(file: Path) -> DataError:
    if kind := _recognised(file):
        return DataError(f"{file}: this is {kind}, not {_name(file)} in UTF-8")
    decoder = codecs.getincrementaldecoder("utf-8")()
    before = lines = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            pending = decoder.getstate()[0]
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                found = (pending + chunk)[error.start]
                lines += (pending + chunk).count(b"\n", 0, error.start)
                place = before - len(pending) + error.start
                return DataError(
                    f"{file}, line {lines + 1}: not UTF-8 at byte {place} (0x{found:02x}); "
                    "convert the file to UTF-8"
                )
            before += len(chunk)
            lines += chunk.count(b"\n")
    return DataError(f"{file}: not UTF-8 at its end; convert the file to UTF-8")


def _name(file: Path) -> str:
    return {".json": "JSON", ".jsonl": "JSON lines", ".csv": "CSV"}.get(file.suffix.lower(), "text")


# --------------------------------------------------------------------------------------------------
# JSON


def _read_json(file: Path) -> Iterator[Placed]:
    """A list of rows, or one row on each line."""
    text = file.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        return ((f"row {i}", row) for i, row in enumerate(_parsed(file, text)))
    if text.lstrip().startswith("{") and isinstance(whole := _or_none(text), dict) and "\n" in text.strip():
        raise DataError(
            f"{file}: expected a list of rows, or one row on each line; "
            f"found one object with the keys {', '.join(map(repr, list(whole)[:8]))}"
        )
    return _parse_lines(file, text.split("\n"))


def _read_jsonl(file: Path) -> Iterator[Placed]:
    with file.open(encoding="utf-8-sig", newline="\n") as stream:
        yield from _parse_lines(file, stream)


def read_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file of JSON lines that are not blank, with their numbers from 1, for `parse_line`."""
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                # what JSON may begin with is above a space and below 0x80; only other lines need a closer look
                if (text := line.strip()) and (
                    b" " < text[:1] < b"\x80" or text.decode("utf-8", "replace").strip()
                ):
                    yield number, line
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error


def _parse_lines(file: Path, lines: Iterable[str]) -> Iterator[Placed]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"line {number}", _parsed(file, line, number)


def parse_line(file: Path, line: int, text: bytes) -> Any:
    """The value of one line of a JSON lines file, as `read_file` reads it."""
    try:
        return _parsed(file, text.decode("utf-8"), line)
    except UnicodeDecodeError as error:
        raise _not_utf8(file) from error


def _parsed(file: Path, text: str, line: int | None = None) -> Any:
    """The value of a JSON text, which is a line of the file or all of it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if kind := _recognised(file):
            raise DataError(f"{file}: this is {kind}, not {_name(file)}") from error
        place = f"line {error.lineno if line is None else line}, column {error.colno}"
        raise DataError(f"{file}, {place}: not JSON: {error.msg}") from error
    except (RecursionError, ValueError) as error:
        place = "" if line is None else f", line {line}"
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DataError(f"{file}{place}: this JSON cannot be read: {why}") from error


def _or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except (RecursionError, ValueError):
        return None


# --------------------------------------------------------------------------------------------------
# CSV and text


def _read_csv(file: Path) -> Iterator[Placed]:
    csv.field_size_limit(_CELL)
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            columns = list(reader.fieldnames or ())
            twice = [name for i, name in enumerate(columns) if name in columns[:i]]
            if twice:
                raise DataError(f"{file}, line 1: two columns are called {twice[0]!r}")
            for row in reader:
                if None in row:
                    raise DataError(
                        f"{file}, line {reader.line_num}: more cells than the {len(columns)} columns of its head"
                    )
                yield f"line {reader.line_num}", row
        except csv.Error as error:
            # the line where the row begins: an open quote reaches to the end of the file
            raise DataError(f"{file}, line {reader.line_num + 1}: not CSV: {error}") from error


def _read_txt(file: Path) -> Iterator[Placed]:
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            yield f"line {number}", {"text": line.rstrip("\n")}


# --------------------------------------------------------------------------------------------------
# Columnar files


def _read_parquet(file: Path) -> Iterator[Placed]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        batches = pq.ParquetFile(file).iter_batches(batch_size=1000)
        yield from _numbered(row for batch in batches for row in batch.to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a Parquet file: {_first_line(error)}") from error


def _read_arrow(file: Path) -> Iterator[Placed]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(file)) as source:
            if source.read(6) == b"ARROW1":
                table = pa.ipc.open_file(source).read_all()
            else:
                source.seek(0)
                table = pa.ipc.open_stream(source).read_all()
            yield from _numbered(row for batch in table.to_batches(1000) for row in batch.to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not an Arrow file: {_first_line(error)}") from error


def _numbered(rows: Iterable[Any]) -> Iterator[Placed]:
    return ((f"row {i}", row) for i, row in enumerate(rows))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")


_READERS: dict[str, Callable[[Path], Iterator[Placed]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".txt": _read_txt,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
