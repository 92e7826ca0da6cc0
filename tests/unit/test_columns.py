"""Tables of plain text."""

from __future__ import annotations

from luthier.columns import aligned

LINES = [("set", "rows", "note"), ("a", "1,000", ""), ("数据", "7", "cut")]


def test_columns_are_as_wide_as_a_terminal_shows_them() -> None:
    assert aligned(LINES).splitlines() == ["set   rows   note", "a     1,000", "数据  7      cut"]


def test_numbers_end_at_the_right() -> None:
    assert aligned(LINES, left=1).splitlines() == ["set    rows  note", "a     1,000", "数据      7   cut"]
