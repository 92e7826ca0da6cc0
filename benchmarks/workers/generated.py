"""What every generating worker reports: one line of JSON."""

from __future__ import annotations

import json
import resource
from typing import Any


def report(job: dict[str, Any], seconds: float, answers: list[list[int]]) -> None:
    print(
        json.dumps(
            {
                "contender": job["contender"],
                "seconds": seconds,
                "rows": len(answers),
                "tokens": sum(map(len, answers)),
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                "answers": answers,
            }
        ),
        flush=True,
    )


def until_end(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
