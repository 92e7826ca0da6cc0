"""What every contender of the encoding benchmark measures and prints."""

from __future__ import annotations

import json
import resource
import time
from types import TracebackType
from typing import Any


class Spent:
    """Seconds inside of `with`, added up: of the wall, and of all processors (`cpu`), those of ended children too."""

    def __init__(self) -> None:
        self.seconds = self.cpu = 0.0
        self._began = (0.0, 0.0)

    def __enter__(self) -> Spent:
        self._began = (time.perf_counter(), _cpu())
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.seconds += time.perf_counter() - self._began[0]
        self.cpu += _cpu() - self._began[1]


def _cpu() -> float:
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def report(
    job: dict[str, Any],
    spent: Spent,
    rows: int,
    tokens: int,
    targets: int | None,
    second_start: float | None,
    peak_mib: float,
) -> None:
    """`spent`: from files to tokens; `second_start`: the same once more, where a cache is there; `peak_mib`: of the
    first process until then."""
    line = {
        "contender": job["contender"],
        "seconds": spent.seconds,
        "cpu_seconds": spent.cpu,
        "rows": rows,
        "tokens": tokens,
        "targets": targets,
        "second_start_seconds": second_start,
        "peak_mib": round(peak_mib, 1),
    }
    print(json.dumps(line), flush=True)
