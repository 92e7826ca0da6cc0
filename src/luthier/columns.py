"""Lines of cells -> a table of plain text."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len


def aligned(lines: Sequence[Sequence[str]], *, left: int | None = None) -> str:
    """Columns two spaces apart, as wide as a terminal shows them; the first `left` (absent: all) begin at the left, the
    others end at the right."""
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(_cells(line, widths, left)).rstrip() for line in lines)


def _cells(line: Sequence[str], widths: Sequence[int], left: int | None) -> list[str]:
    blanks = [" " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True)]
    at_left = len(line) if left is None else left
    return [
        cell + blank if place < at_left else blank + cell
        for place, (cell, blank) in enumerate(zip(line, blanks, strict=True))
    ]
