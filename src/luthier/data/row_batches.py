"""The rows of a data set in batches, each of which is encoded at once, wherever that happens.

row_batches(rows)          batches of a thousand rows, or of fewer long ones
EncodeBatch(attr, how)     a batch -> its samples, counted; a value that other processes can be sent
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from luthier.data.cache import CountedPart, counted_parts
from luthier.data.encode_raw import encode_all
from luthier.data.preparation import Preparation
from luthier.data.read import RawLine, RawRow, SeenColumns
from luthier.data.registry import DatasetAttr

_ROWS, _SLOW_ROWS = 1000, 50
_CHARACTERS = 1 << 22
"""Characters of a batch's rows, more or less; they and their tokens are in memory at once."""


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Rows that follow one another; `first` is the position of the first one among the rows that were read."""

    first: int
    rows: list[RawRow | RawLine]

    def named(self) -> str:
        """Its rows, for messages."""
        return f"rows {self.rows[0].index} to {self.rows[-1].index}"


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """What became of a batch; `columns` are those of its rows, where the description names any."""

    parts: list[CountedPart]
    columns: tuple[str, ...]
    rows: int


def row_batches(rows: Iterable[RawRow | RawLine], *, slow: bool = False) -> Iterator[RowBatch]:
    """The rows in their order; fewer at once where each takes long, as those with media do."""
    most = _SLOW_ROWS if slow else _ROWS
    first, size, held = 0, 0, list[RawRow | RawLine]()
    for row in rows:
        held.append(row)
        size += len(row.line) if isinstance(row, RawLine) else _characters(row)
        if len(held) == most or size >= _CHARACTERS:
            yield RowBatch(first, held)
            first, size, held = first + len(held), 0, []
    if held:
        yield RowBatch(first, held)


def _characters(row: RawRow) -> int:
    return sum(len(value) for value in row.columns.values() if isinstance(value, str | bytes))


@dataclass(frozen=True, slots=True)
class EncodeBatch:
    """Encodes the batches of one data set. Raises DataError for a row that nothing can be made of."""

    attr: DatasetAttr
    how: Preparation

    def __call__(self, batch: RowBatch) -> EncodedBatch:
        columns = SeenColumns(self.attr)
        raws = [row.parsed() for row in batch.rows]
        for raw in raws:
            columns.add(raw.columns)
        parts = list(counted_parts(encode_all(raws, self.attr, self.how), batch.first))
        return EncodedBatch(parts, tuple(columns.seen), len(batch.rows))
