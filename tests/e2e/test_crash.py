"""Six seeded kill -9 with automatic resume; fifty are recorded in benchmarks/results/crash.json."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "crash.py"


@pytest.mark.slow
def test_six_killed_runs_end_as_if_nothing_had_happened(tmp_path: Path) -> None:
    results = tmp_path / "crash.json"
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--kills", "6", "--results", str(results)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(results.read_text())["summary"]
    assert summary["runs"] == summary["runs_that_ended_bitwise_equal"] == 6
    assert summary["kills"] >= 4


def test_the_recorded_fifty() -> None:
    recorded = json.loads((BENCHMARK.parent / "results" / "crash.json").read_text())
    summary = recorded["summary"]
    assert summary["runs"] == summary["runs_that_ended_bitwise_equal"] == len(recorded["runs"]) >= 50
    assert summary["kills_with_a_half_written_checkpoint"] >= 15
    assert {run["asynchronous"] for run in recorded["runs"]} == {True, False}
