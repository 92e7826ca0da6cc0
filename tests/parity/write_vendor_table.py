"""Writes the table of outcomes into docs/templates.md: `python tests/parity/write_vendor_table.py`; see README.md."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from test_vendor_templates import DOCUMENT, outcomes
from vendors import folder, templates

MARK = "<!-- outcomes -->"


def main() -> None:
    if folder() is None:
        raise SystemExit("set LUTHIER_VENDORS, or llama.cpp's templates are missing from the table")
    lines = ["| template | answers | reasoning | tool calls |", "|---|---|---|---|"]
    lines += [f"| `{name}` | {' | '.join(outcomes(name))} |" for name in templates()]
    before, _, after = DOCUMENT.read_text("utf-8").split(MARK)
    DOCUMENT.write_text(MARK.join([before, "\n" + "\n".join(lines) + "\n", after]), encoding="utf-8")


if __name__ == "__main__":
    main()
