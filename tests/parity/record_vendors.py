"""Records the hashes of what the vendors' templates render: `python tests/parity/record_vendors.py`.

LUTHIER_VENDORS names the folder with the templates that no package holds; see README.md beside this file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from vendors import REFERENCES, cases, short_hash, source_of

TARGET = Path(__file__).parent / "data" / "vendor_renderings.json"


def main() -> None:
    recorded = {}
    for family, reference in sorted(REFERENCES.items()):
        source = source_of(reference.template)
        if source is None:
            raise SystemExit(f"set LUTHIER_VENDORS: {reference.template} is not in an installed package")
        hashes = {case: short_hash(text) for case, text in cases(source, reference).items()}
        recorded[family] = {"template": reference.template, "sha256": short_hash(source), "cases": hashes}
    TARGET.write_text(json.dumps(recorded, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
