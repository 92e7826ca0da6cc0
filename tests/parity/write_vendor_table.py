"""Writes the table of outcomes into docs/templates.md: `python tests/parity/write_vendor_table.py`; see README.md."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
_TESTS = runpy.run_path(str(Path(__file__).with_name("test_vendor_templates.py")))
MARK = "<!-- outcomes -->"


def main() -> None:
    document: Path = _TESTS["DOCUMENT"]
    if _TESTS["folder"]() is None:
        raise SystemExit("set LUTHIER_VENDORS, or llama.cpp's templates are missing from the table")
    lines = ["| template | answers | reasoning | tool calls |", "|---|---|---|---|"]
    lines += [f"| `{name}` | {' | '.join(_TESTS['outcomes'](name))} |" for name in _TESTS["templates"]()]
    before, _, after = document.read_text("utf-8").split(MARK)
    document.write_text(MARK.join([before, "\n" + "\n".join(lines) + "\n", after]), encoding="utf-8")


if __name__ == "__main__":
    main()
