"""One raw row -> samples and losses: what tables and streams do with each of their rows.

encode_raw(raw, attr, how)     one
encode_all(raws, attr, how)    many, whose texts are tokenized at once: the same, in less time
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from luthier.data.formats import to_row
from luthier.data.gate import gate
from luthier.data.preparation import Preparation
from luthier.data.read import RawRow
from luthier.data.registry import DatasetAttr
from luthier.types import Encoded, Lost, Row, RowError

_GATE_FIRST, _GATE_EVERY = 50, 100


def encode_raw(raw: RawRow, attr: DatasetAttr, how: Preparation) -> Encoded:
    """What becomes of a row; the first ones of a data set, and every hundredth, pass the gate.

    Raises DataError for a row that nothing can be made of, and for a template that cannot be trained.
    """
    return _encoded(_row(raw, attr, how), how)


def encode_all(raws: Sequence[RawRow], attr: DatasetAttr, how: Preparation) -> Iterator[tuple[int, Encoded]]:
    """The same of many, each with its row's index; a row that nothing can be made of is raised before any."""
    rows = [_row(raw, attr, how) for raw in raws]
    both = [(row.conversation, row.rejected) for row in rows if isinstance(row, Row)]
    how.template.tokenize(one for pair in both for one in pair if one is not None)
    try:
        for raw, row in zip(raws, rows, strict=True):
            yield raw.index, _encoded(row, how)
    finally:
        how.template.tokenize(())  # the template outlives these rows, and shall not hold them


def _row(raw: RawRow, attr: DatasetAttr, how: Preparation) -> Row | Encoded:
    try:
        return how.template.reasoning.split_row(to_row(raw, attr, how.kind))
    except RowError as error:
        return Encoded(lost=Lost(dropped=error.reason))


def _encoded(row: Row | Encoded, how: Preparation) -> Encoded:
    if isinstance(row, Encoded):
        return row
    if how.kind != "text" and (row.index < _GATE_FIRST or row.index % _GATE_EVERY == 0):
        gate(how.template, [row])
    return how.encode(row, how.template)
