"""CPU seconds of `luthier --help`, a fresh process each time; the target is under 0.3.

python benchmarks/help_speed.py
"""

from __future__ import annotations

import resource
import subprocess
import sys

ROUNDS = 5


def cpu_seconds() -> float:
    """User and system time of one `luthier --help`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "luthier.cli", "--help"], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    times = sorted(cpu_seconds() for _ in range(ROUNDS))
    print(f"luthier --help: {times[0]:.3f} s least, {times[ROUNDS // 2]:.3f} s median of {ROUNDS}, CPU")
