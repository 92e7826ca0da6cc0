"""One raw row -> samples and losses: what tables and streams do with each of their rows."""

from __future__ import annotations

from luthier.data.formats import to_row
from luthier.data.gate import gate
from luthier.data.preparation import Preparation
from luthier.data.read import RawRow
from luthier.data.registry import DatasetAttr
from luthier.types import Encoded, Lost, RowError

_GATE_FIRST, _GATE_EVERY = 50, 100


def encode_raw(raw: RawRow, attr: DatasetAttr, how: Preparation) -> Encoded:
    """What becomes of a row; the first ones of a data set, and every hundredth, pass the gate.

    Raises DataError for a row that nothing can be made of, and for a template that cannot be trained.
    """
    try:
        row = how.template.reasoning.split_row(to_row(raw, attr, how.kind))
    except RowError as error:
        return Encoded(lost=Lost(dropped=error.reason))
    if how.kind != "text" and (raw.index < _GATE_FIRST or raw.index % _GATE_EVERY == 0):
        gate(how.template, [row])
    return how.encode(row, how.template)
