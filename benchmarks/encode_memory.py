"""Peak memory of encoding files of growing size, and the rows per second.

    python benchmarks/encode_memory.py --megabytes 100 400 2000

Each file holds conversations as in `encode.py`, and is encoded by one process. Memory is the kernel's high-water mark
of the resident set when the tokens lie in the cache, libraries included.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import encode
import side_by_side
from side_by_side import Contender

BYTES_IN_A_ROW = 1400
LUTHIER = Contender("encode_luthier.py")


def parse() -> Any:
    parser = side_by_side.parser(
        __doc__, {"luthier": LUTHIER}, dataset="alpaca_en_demo", steps=2, results="encode_memory.json"
    )
    parser.add_argument("--megabytes", type=int, nargs="+", default=[100, 400])
    return side_by_side.parse(parser, {"luthier": LUTHIER})


def main() -> None:
    options = parse()
    measured: dict[str, Any] = {}
    for megabytes in options.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.jsonl"
            encode.write_rows(encode.source_of(options), file, megabytes * 10**6 // BYTES_IN_A_ROW, seed=0)
            job = side_by_side.job_settings(options) | {"rows": str(file), "processes": 1}
            line = side_by_side.run(options, job, "luthier", LUTHIER)
            measured[f"{file.stat().st_size / 1e6:.0f} MB"] = {
                "rows": line["rows"],
                "tokens": line["tokens"],
                "peak_mib": line["peak_mib"],
                "rows_per_second": round(line["rows"] / line["seconds"]),
                "second_start_seconds": round(line["second_start_seconds"], 2),
            }
        print(measured, flush=True)
        side_by_side.write({"threads": options.threads, "files": measured}, Path(options.results))


if __name__ == "__main__":
    main()
