"""The line that every contender of the encoding benchmark prints."""

from __future__ import annotations

import json
from typing import Any


def report(
    job: dict[str, Any],
    seconds: float,
    rows: int,
    tokens: int,
    targets: int | None,
    second_start: float | None,
    peak_mib: float,
) -> None:
    """`seconds`: from files to tokens; `second_start`: the same once more, where a cache is there; `peak_mib`: of the
    first process until then."""
    line = {
        "contender": job["contender"],
        "seconds": seconds,
        "rows": rows,
        "tokens": tokens,
        "targets": targets,
        "second_start_seconds": second_start,
        "peak_mib": round(peak_mib, 1),
    }
    print(json.dumps(line), flush=True)
