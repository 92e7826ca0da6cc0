"""`trainer_log.jsonl`, read back: what a run has logged, each step once, over its tokens and its time.

Nothing heavy is imported here, so that whoever watches a run needs neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from luthier.types import CheckpointError

LOG_NAME = "trainer_log.jsonl"

Axis = Literal["steps", "tokens", "time"]

_NO_METRICS = frozenset(
    {
        "current_steps",
        "total_steps",
        "resumed_from",
        "epoch",
        "percentage",
        "tokens",
        "tokens_per_second",
        "memory",
        "train_loss",
        "total_flos",
    }
)
_NO_METRIC_ENDINGS = ("_runtime", "_per_second", "_time")
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")


def read_log(path: Path, *, unfinished: bool = False) -> list[dict[str, Any]]:
    """The lines of a log as objects.

    unfinished: the run may be at work or was killed; a last line without its line end is left out.
    Raises CheckpointError that names the file and the line at fault.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: there is no training log to draw")
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines()
    if unfinished and lines and not text.endswith("\n"):
        del lines[-1]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise CheckpointError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(record, dict) or type(record.get("current_steps")) is not int:
            raise CheckpointError(f"{path}, line {number} has no whole number `current_steps`: {line[:80]!r}")
        records.append(record)
    if not records:
        raise CheckpointError(f"{path} is empty: there is nothing to draw")
    return records


def number(value: Any) -> float | None:
    """The number that a log line holds; "NaN", "Infinity" and "-Infinity" are numbers, truth values are not."""
    if isinstance(value, bool) or not (isinstance(value, int | float) or value in _NOT_FINITE):
        return None
    return float(value)


def metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """What a line measures, by name: places, rates and totals left out."""
    found = {
        name: number(value)
        for name, value in record.items()
        if name not in _NO_METRICS and not name.endswith(_NO_METRIC_ENDINGS)
    }
    return {name: value for name, value in found.items() if value is not None}


def settled(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines that still hold: where a run went back to an earlier step, what it had logged after that goes."""
    kept: list[dict[str, Any]] = []
    for record in records:
        step = record["current_steps"]
        if kept and kept[-1]["current_steps"] > step:
            kept = [line for line in kept if line["current_steps"] < step]
        kept.append(record)
    return kept


def positions(records: Sequence[Mapping[str, Any]], axis: Axis) -> list[float | None]:
    """Where each line stands on an axis; None where it does not say.

    steps: optimizer steps. tokens: real tokens trained on so far. time: seconds of training, evaluation and
    saving; `elapsed_time` counts from the start of its process, so a resumed run's goes on from the last line
    before the resume.
    """
    if axis == "steps":
        return [float(record["current_steps"]) for record in records]
    if axis == "tokens":
        # A line before the first step has trained on nothing.
        zero = {0: 0.0}
        return [number(record.get("tokens", zero.get(record["current_steps"]))) for record in records]
    places: list[float | None] = []
    before, last = 0.0, 0.0
    process: object = None
    for record in records:
        elapsed = _seconds(record.get("elapsed_time"))
        if elapsed is None:
            places.append(None)
            continue
        if record.get("resumed_from") != process or before + elapsed < last:
            before, process = last, record.get("resumed_from")
        last = before + elapsed
        places.append(last)
    return places


def _seconds(clock: Any) -> float | None:
    """H:MM:SS in seconds."""
    parts = clock.split(":") if isinstance(clock, str) else []
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        return None
    hours, minutes, seconds = (int(part) for part in parts)
    return float(3600 * hours + 60 * minutes + seconds)
