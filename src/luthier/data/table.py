"""Many samples in Arrow memory: mapped from a file or held, never copied when read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from luthier.samples import MediaOpener
from luthier.types import Media, Sample

Int64 = np.ndarray[Any, np.dtype[np.int64]]

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("weights", pa.list_(pa.float32())),
        ("index", pa.int64()),
        ("row", pa.int64()),
        ("branches", pa.list_(pa.int32())),
        ("label", pa.float32()),
        ("media", pa.large_string()),
    ]
)
_CHUNK = 1000

Placed = tuple[int, Sample]
"""A sample, and the position of its row among the rows that were read."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One record batch as NumPy views: sample i is tokens [offsets[i], offsets[i + 1])."""

    source: str
    offsets: np.ndarray[Any, np.dtype[np.int32]]
    input_ids: np.ndarray[Any, np.dtype[np.int32]]
    weights: np.ndarray[Any, np.dtype[np.float32]]
    index: Int64
    row: Int64
    branch_offsets: np.ndarray[Any, np.dtype[np.int32]]
    branches: np.ndarray[Any, np.dtype[np.int32]]
    label: np.ndarray[Any, np.dtype[np.float32]]
    media: pa.LargeStringArray

    def branches_of(self, k: int) -> tuple[int, ...]:
        return tuple(self.branches[self.branch_offsets[k] : self.branch_offsets[k + 1]].tolist())

    def media_of(self, k: int) -> tuple[Media, ...]:
        if not (text := self.media[k].as_py()):
            return ()
        return tuple(
            Media(kind, source if isinstance(source, str) else tuple(source))
            for kind, source in json.loads(text)
        )


class SampleTable(Sequence[Sample]):
    """Samples by number; each read is a view into Arrow memory.

    `lengths` (n,) and `rows` (n,) are arrays: tokens of each sample, and the position of the row that it
    comes from (ascending). `groups`, where not None, are the samples that packing puts into one row.
    """

    def __init__(
        self,
        chunks: Sequence[_Chunk] = (),
        order: Int64 | None = None,
        rows: Int64 | None = None,
        groups: list[list[int]] | None = None,
        opener: MediaOpener | None = None,
    ) -> None:
        self._chunks = list(chunks)
        self._starts = np.cumsum([0, *(len(chunk.index) for chunk in self._chunks)], dtype=np.int64)
        self._order = order
        self._rows = rows
        self.groups = groups
        self._opener = opener

    @classmethod
    def of(cls, samples: Iterable[Placed], source: str = "") -> SampleTable:
        """A table in memory. All samples are of one source."""
        return cls([_chunk(batch, source) for batch in batches_of(samples)])

    @classmethod
    def of_mixed(cls, samples: Sequence[Sample]) -> SampleTable:
        """A table in memory of samples of several sources, each a row of its own."""
        runs: list[list[Placed]] = []
        for row, sample in enumerate(samples):
            if not runs or runs[-1][0][1].source != sample.source:
                runs.append([])
            runs[-1].append((row, sample))
        return cls([_chunk(batch, run[0][1].source) for run in runs for batch in batches_of(run)])

    @classmethod
    def open(cls, file: Path, source: str) -> SampleTable:
        """A table that is mapped from an Arrow file. Raises pyarrow.ArrowInvalid for a damaged one."""
        reader = pa.ipc.open_file(pa.memory_map(str(file)))
        if reader.schema != SCHEMA:
            raise pa.ArrowInvalid("unexpected schema")
        return cls([_chunk(reader.get_batch(i), source) for i in range(reader.num_record_batches)])

    @classmethod
    def concat(cls, tables: Sequence[SampleTable], num_rows: Sequence[int]) -> SampleTable:
        """Tables one after the other; `num_rows[t]` is how many rows table t was read from."""
        offsets = np.cumsum([0, *num_rows], dtype=np.int64)
        rows = [table.rows + offset for table, offset in zip(tables, offsets, strict=False)]
        return cls(
            [chunk for table in tables for chunk in table._chunks],
            rows=np.concatenate(rows) if rows else np.zeros(0, np.int64),
            opener=next((table._opener for table in tables), None),
        )

    def take_rows(self, positions: Int64) -> SampleTable:
        """The samples of these rows, in the order of `positions`, which becomes the new row numbering; a row that is
        named twice is there twice."""
        first, after = (np.searchsorted(self.rows, positions, side=side) for side in ("left", "right"))
        counts = after - first
        ranks = np.repeat(np.arange(len(positions)), counts)
        kept = np.arange(counts.sum()) + np.repeat(first - (np.cumsum(counts) - counts), counts)
        order = kept if self._order is None else self._order[kept]
        return SampleTable(self._chunks, order, ranks, opener=self._opener)

    def with_groups(self, groups: list[list[int]]) -> SampleTable:
        return SampleTable(self._chunks, self._order, self._rows, groups, self._opener)

    def with_opener(self, opener: MediaOpener | None) -> SampleTable:
        """The same samples, each with what opens its media."""
        return SampleTable(self._chunks, self._order, self._rows, self.groups, opener)

    @property
    def has_media(self) -> bool:
        """Whether any row of its files has images, films or sounds."""
        return any(pc.max(pc.binary_length(chunk.media)).as_py() for chunk in self._chunks)

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._order is None else len(self._order)

    @overload
    def __getitem__(self, i: int) -> Sample: ...
    @overload
    def __getitem__(self, i: slice) -> list[Sample]: ...
    def __getitem__(self, i: int | slice) -> Sample | list[Sample]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        at = i % len(self)
        stored = at if self._order is None else int(self._order[at])
        number = int(np.searchsorted(self._starts, stored, side="right")) - 1
        chunk = self._chunks[number]
        k = stored - int(self._starts[number])
        span = slice(int(chunk.offsets[k]), int(chunk.offsets[k + 1]))
        return Sample(
            chunk.input_ids[span],
            chunk.weights[span],
            chunk.source,
            int(chunk.index[k]),
            chunk.branches_of(k),
            float(chunk.label[k]),
            media=chunk.media_of(k),
            opener=self._opener,
        )

    @cached_property
    def lengths(self) -> Int64:
        return self._gather([np.diff(chunk.offsets) for chunk in self._chunks])

    def lengths_of(self, source: str) -> Int64:
        """`row_lengths` of each sample that comes from this data set."""
        lengths: Int64 = self.row_lengths[self.members(source)]
        return lengths

    def members(self, source: str) -> Int64:
        """The numbers of the samples that come from this data set, ascending."""
        chosen = self._gather([np.full(len(chunk.index), chunk.source == source) for chunk in self._chunks])
        return np.flatnonzero(chosen)

    @cached_property
    def prompt_lengths(self) -> Int64:
        """Tokens of the prompt of each sample that has branches; 0 of others."""
        return self._gather([_first_branches(chunk) for chunk in self._chunks])

    @cached_property
    def row_lengths(self) -> Int64:
        """Tokens of the longest row that each sample makes: its prompt with its longest branch."""
        return self._gather([_longest_rows(chunk) for chunk in self._chunks])

    @cached_property
    def num_branches(self) -> Int64:
        """Branches of each sample; 0 of one that is a single sequence."""
        return self._gather([np.diff(chunk.branch_offsets) for chunk in self._chunks])

    @cached_property
    def rows(self) -> Int64:
        return self._gather([chunk.row for chunk in self._chunks]) if self._rows is None else self._rows

    def _gather(self, parts: Sequence[np.ndarray[Any, Any]]) -> Int64:
        stored = np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)
        return stored if self._order is None else stored[self._order]


def write_table(file: Path, samples: Iterable[Placed]) -> int:
    """Write samples to an Arrow file; returns how many. They are held in memory a thousand at a time."""
    return write_batches(file, batches_of(samples))


def write_batches(file: Path, batches: Iterable[pa.RecordBatch]) -> int:
    """Write batches of `batches_of` to an Arrow file; returns how many samples they hold."""
    total = 0
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for batch in batches:
            writer.write_batch(batch)
            total += batch.num_rows
    return total


def batches_of(samples: Iterable[Placed]) -> Iterator[pa.RecordBatch]:
    """The samples as record batches of up to a thousand."""
    stream = iter(samples)
    while batch := list(islice(stream, _CHUNK)):
        offsets = np.cumsum([0, *(len(sample) for _, sample in batch)], dtype=np.int32)
        columns = [
            pa.ListArray.from_arrays(offsets, np.concatenate([sample.input_ids for _, sample in batch])),
            pa.ListArray.from_arrays(offsets, np.concatenate([sample.weights for _, sample in batch])),
            pa.array([sample.index for _, sample in batch], pa.int64()),
            pa.array([row for row, _ in batch], pa.int64()),
            pa.array([sample.branches for _, sample in batch], pa.list_(pa.int32())),
            pa.array([sample.label for _, sample in batch], pa.float32()),
            pa.array([_media_text(sample) for _, sample in batch], pa.large_string()),
        ]
        yield pa.record_batch(columns, schema=SCHEMA)


def _chunk(batch: pa.RecordBatch, source: str) -> _Chunk:
    ids, weights, branches = (batch.column(name) for name in ("input_ids", "weights", "branches"))
    return _Chunk(
        source,
        ids.offsets.to_numpy(),
        ids.values.to_numpy(),
        weights.values.to_numpy(),
        batch.column("index").to_numpy(),
        batch.column("row").to_numpy(),
        branches.offsets.to_numpy(),
        branches.values.to_numpy(),
        batch.column("label").to_numpy(),
        batch.column("media"),
    )


def _media_text(sample: Sample) -> str:
    if not sample.media:
        return ""
    return json.dumps([[one.kind, one.source] for one in sample.media], ensure_ascii=False)


def _longest_rows(chunk: _Chunk) -> Int64:
    longest = np.diff(chunk.offsets).astype(np.int64)
    for k in np.flatnonzero(np.diff(chunk.branch_offsets)).tolist():
        bounds = np.asarray((*chunk.branches_of(k), longest[k]))
        longest[k] = bounds[0] + np.diff(bounds).max()
    return longest


def _first_branches(chunk: _Chunk) -> Int64:
    first = np.zeros(len(chunk.index), np.int64)
    with_branches = np.flatnonzero(np.diff(chunk.branch_offsets))
    first[with_branches] = chunk.branches[chunk.branch_offsets[:-1][with_branches]]
    return first
