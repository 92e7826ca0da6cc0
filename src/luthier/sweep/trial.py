"""One trial: `luthier train` in a process of its own, watched through its log, and what is left of it.

A crash, a full memory or a signal ends that process and nothing else.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.recipe.sweep import word
from luthier.sweep.records import Status

LOG_NAME = "trainer_log.jsonl"
RESULTS_NAME = "all_results.json"
INTERRUPTED = (75, 130, -signal.SIGINT, -signal.SIGTERM)
"""Exit statuses of `luthier train` after a signal: with a checkpoint saved, and without."""

GRACE = 120.0
"""Seconds that a stopped trial has to save its checkpoint and end."""
_POLL = 0.2
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "checkpoint-*", ".tmp-*")

Watch = Callable[[int, float], bool]
"""Told a step and the metric there; says whether the trial should stop."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a trial's process ended. `interrupted`: by a signal from elsewhere, so that nothing is known."""

    status: Status
    value: float | None
    seconds: float
    error: str | None = None
    interrupted: bool = False


def command(recipe: Path, words: Sequence[str], folder: Path, metric: str) -> list[str]:
    """The command line of a trial, also of one that was interrupted.

    An evaluation gives the same number in a resumed run; what a run says of its own training counts from where
    it was resumed, so a trial judged by that begins anew.
    """
    resumed = metric.startswith("eval_")
    own = {
        "train.output": str(folder),
        "train.resume": "auto" if resumed else "never",
        "train.overwrite": not resumed,
        # Only the best is worth an upload, and whoever trains best.yaml gets it.
        "train.push_to_hub": None,
    }
    own_words = [word(key, value) for key, value in own.items()]
    return [sys.executable, "-m", "luthier.cli", "train", str(recipe), *words, *own_words]


def run_trial(
    arguments: Sequence[str],
    folder: Path,
    metric: str,
    watch: Watch | None,
    started: Callable[[int], None],
) -> Outcome:
    """Run a trial to its end; what it prints goes to `FOLDER.log`.

    watch: asked at every logged value of `metric` before the last step; True stops the trial. started: told
    the process. Raises KeyboardInterrupt after the trial has been stopped, where that came in the meantime.
    """
    said = folder.with_name(f"{folder.name}.log")
    begun = time.monotonic()
    seen: set[int] = set()
    with said.open("ab") as stream:
        position = stream.tell()
        # A session of its own: Ctrl-C reaches this process, which then stops the trial in order.
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            started(process.pid)
            pruned = _follow(process, folder / LOG_NAME, metric, watch, seen)
        except BaseException:
            stop(process)
            raise
    seconds = round(time.monotonic() - begun, 3)
    if pruned is not None:
        return Outcome("pruned", pruned, seconds)
    if process.returncode:
        error = _last_line(said, position, process.returncode)
        interrupted = process.returncode in INTERRUPTED
        return Outcome("failed", None, seconds, error, interrupted)
    return _result(folder / RESULTS_NAME, metric, seconds)


def _follow(
    process: subprocess.Popen[bytes], log: Path, metric: str, watch: Watch | None, seen: set[int]
) -> float | None:
    """Wait for the end; the metric's last value where `watch` stopped the trial before it.

    What was logged decides, not when it was read: a trial that had ended by then counts as stopped, too, so
    that the same file always gives the same sweep.
    """
    while True:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_POLL)
        ended = process.returncode is not None
        for step, value in _values(log, metric) if watch is not None else ():
            if step in seen:
                continue
            seen.add(step)
            if watch is not None and watch(step, value):
                stop(process)
                return value
        if ended:
            return None


def _values(log: Path, metric: str) -> list[tuple[int, float]]:
    """(step, value) of the metric in a log that may be growing, those of the last step left out."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    found = []
    for line in text.split("\n")[:-1]:
        record: dict[str, Any] = json.loads(line)
        if metric in record and record["current_steps"] < record.get("total_steps", 0):
            found.append((record["current_steps"], float(record[metric])))
    return found


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask a trial to end, and its whole group to die where it does not within GRACE, or on another Ctrl-C."""
    if process.poll() is not None:
        return
    # Not SIGINT: what a shell starts in the background ignores it, and hands that down.
    process.terminate()
    try:
        process.wait(timeout=GRACE)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        if os.name == "nt":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _last_line(said: Path, position: int, status: int) -> str:
    """Why a trial failed, in a line."""
    if status < 0:
        name = signal.Signals(-status).name
        return f"killed by {name}" + ("; often the system, when memory is full" if name == "SIGKILL" else "")
    with said.open("rb") as stream:
        stream.seek(position)
        lines = stream.read().decode("utf-8", errors="replace").splitlines()
    last = next((line.strip() for line in reversed(lines) if line.strip()), f"exit status {status}")
    return last.removeprefix("error: ")


def _result(file: Path, metric: str, seconds: float) -> Outcome:
    """The metric of a trial that ended well; a trial without a finite one has failed."""
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    value = results.get(metric)
    if not isinstance(value, int | float):
        there = ", ".join(results) or "nothing"
        return Outcome("failed", None, seconds, f"it ended without {metric}; there is {there}")
    if not math.isfinite(value):
        return Outcome("failed", None, seconds, f"{metric} is {value}")
    return Outcome("done", float(value), seconds)


def remove_weights(folder: Path) -> None:
    """Delete the weights and checkpoints of a run; its recipe, log, numbers and pictures stay."""
    for pattern in _WEIGHTS:
        for path in sorted(folder.glob(pattern)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
