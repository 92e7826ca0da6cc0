"""The tokenized cache, addressed by content.

An entry's name is the hash of everything that decides its tokens (see `prepare.cache_key`). Change any of it
and another entry is made; change none and the entry is used. Entries appear by renaming a finished folder, so
two processes that prepare the same data at once cannot harm each other, and a killed one leaves nothing that
is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from luthier.data.report import DataReport, ReportBuilder
from luthier.data.table import SampleTable, batches_of, write_batches
from luthier.types import DataError, Encoded

CODE_VERSION = 4
"""Raise when the code makes other tokens, weights or reports of the same inputs."""

_TOKENS, _REPORT, _WORK = "tokens.arrow", "report.json", "work"

_ROWS = 1000
"""Rows of which the samples are in memory before they are written."""

_ABANDONED = 24 * 3600
"""Seconds after which an unfinished entry that nobody writes to is removed."""


def default_folder() -> Path:
    """`$LUTHIER_CACHE`, or `luthier/tokens` in the user's cache folder."""
    if chosen := os.environ.get("LUTHIER_CACHE"):
        return Path(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "luthier" / "tokens"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "luthier" / "tokens"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "luthier" / "tokens"


def content_key(parts: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON-like value, independent of the order of its keys."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class TokenCache:
    """A folder of entries, each a folder with the samples (Arrow) and their report (JSON)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str, dataset: str) -> tuple[SampleTable, DataReport] | None:
        """The entry, under the name of this data set; None where there is none or it is damaged."""
        entry = self.folder / key
        try:
            record = json.loads((entry / _REPORT).read_text(encoding="utf-8"))
            if (entry / _TOKENS).stat().st_size != record["bytes"]:
                return None
            table = SampleTable.open(entry / _TOKENS, dataset)
        except (FileNotFoundError, json.JSONDecodeError, KeyError, pa.ArrowInvalid):
            return None
        return table, DataReport.from_dict(record["report"] | {"dataset": dataset})

    def put(
        self, key: str, dataset: str, rows: Iterable[tuple[int, Encoded]]
    ) -> tuple[SampleTable, DataReport]:
        """Store encoded rows, given as (row number in the data set, what became of it), and return the entry.

        Raises DataError where the disk is full or the folder cannot be written.
        """
        return self.store(key, dataset, lambda _: counted_parts(rows))

    def store(
        self, key: str, dataset: str, parts: Callable[[Path], Iterable[CountedPart]]
    ) -> tuple[SampleTable, DataReport]:
        """The same of parts, one after the other; `parts` is given a folder that it may use until they are stored."""
        self._sweep()
        unfinished = self.folder / f".{key[:16]}-{os.getpid()}-{secrets.token_hex(4)}"
        builder = ReportBuilder(dataset)

        def batches(work: Path) -> Iterator[pa.RecordBatch]:
            for part in parts(work):
                builder.merge(part.counted)
                yield from part.batches

        try:
            work = unfinished / _WORK
            work.mkdir(parents=True)
            write_batches(unfinished / _TOKENS, batches(work))
            shutil.rmtree(work, ignore_errors=True)
            size = (unfinished / _TOKENS).stat().st_size
            record = {"bytes": size, "report": builder.report().to_dict()}
            (unfinished / _REPORT).write_text(json.dumps(record, indent=1), encoding="utf-8")
            self._publish(unfinished, self.folder / key, dataset)
        except OSError as error:
            raise DataError(
                f"cannot write the tokenized cache in {self.folder}: {error.strerror or error}; "
                "make room, or choose another folder with data.cache"
            ) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        found = self.get(key, dataset)
        if found is None:
            raise DataError(f"the tokenized cache entry {self.folder / key} vanished while it was written")
        return found

    def _sweep(self) -> None:
        """Remove what processes that were killed left behind, once nobody can be writing it any more."""
        for unfinished in self.folder.glob(".*-*-*"):
            try:
                touched = max(path.stat().st_mtime for path in (unfinished, *unfinished.iterdir()))
            except OSError:
                continue  # finished or removed by its own process in the meantime
            if time.time() - touched > _ABANDONED:
                shutil.rmtree(unfinished, ignore_errors=True)

    def _publish(self, unfinished: Path, entry: Path, dataset: str) -> None:
        if entry.exists() and self.get(entry.name, dataset) is None:
            shutil.rmtree(entry, ignore_errors=True)
        try:
            unfinished.rename(entry)
        except OSError:
            # somebody else has finished the same entry in the meantime: it holds the same bytes
            if self.get(entry.name, dataset) is None:
                raise


@dataclass(frozen=True, slots=True)
class CountedPart:
    """Some encoded rows: their samples, and the `state` of a `ReportBuilder` that has counted the rows."""

    batches: Sequence[pa.RecordBatch]
    counted: Mapping[str, Any]


def counted_parts(rows: Iterable[tuple[int, Encoded]], first: int = 0) -> Iterator[CountedPart]:
    """Encoded rows in parts; `first` is the position of the first one among the rows that were read."""
    stream = enumerate(rows, start=first)
    while some := list(islice(stream, _ROWS)):
        builder = ReportBuilder("")
        for _, (index, encoded) in some:
            builder.add(index, encoded)
        samples = ((position, sample) for position, (_, encoded) in some for sample in encoded.samples)
        yield CountedPart(list(batches_of(samples)), builder.state())
