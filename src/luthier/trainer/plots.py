"""The curves of a run as PNG files, drawn from its `trainer_log.jsonl`.

Only `Figure` objects are used, never `pyplot`: drawing changes no global state and needs no display.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from luthier.trainer.callbacks import LOG_NAME
from luthier.types import CheckpointError

_NOT_DRAWN = frozenset(
    {
        "current_steps",
        "total_steps",
        "epoch",
        "percentage",
        "tokens",
        "tokens_per_second",
        "memory",
        "train_loss",
        "total_flos",
    }
)
_NOT_DRAWN_ENDINGS = ("_runtime", "_per_second", "_time")
_COLORS = ("#1f6feb", "#d9480f", "#2b8a3e", "#9c36b5", "#b08900", "#0b7285", "#c2255c", "#495057")
_MANY_POINTS = 40
"""With more points than this, a marker on each would hide the curve."""

Curve = tuple[list[int], list[float]]
"""Steps, and the value at each."""


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log as objects. Raises CheckpointError that names the file and the line at fault."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: there is no training log to draw")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
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


def curves(records: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """Every metric in the log with its steps and values, in the order in which metrics first appear.

    "NaN", "Infinity" and "-Infinity" are read as numbers; they leave gaps in a curve.
    """
    found: dict[str, Curve] = {}
    for record in records:
        for name, value in record.items():
            if name in _NOT_DRAWN or name.endswith(_NOT_DRAWN_ENDINGS) or isinstance(value, bool):
                continue
            if not isinstance(value, int | float) and value not in ("NaN", "Infinity", "-Infinity"):
                continue
            steps, values = found.setdefault(name, ([], []))
            steps.append(record["current_steps"])
            values.append(float(value))
    return found


def smooth(values: Sequence[float]) -> list[float]:
    """The exponential moving average without the bias of its start, in the length of `values`:

        s_t = sum_{i <= t} b^(t - i) v_i / sum_{i <= t} b^(t - i),      b = 1 - 1 / w,

    where the window w is a thirtieth of the number of values, at least 2 and at most 100. (Dividing by the
    weights given so far is the correction of Kingma & Ba, 2014, arXiv:1412.6980.) A value that is not finite
    counts for nothing and gives NaN at its own place.
    """
    keep = 1 - 1 / min(max(len(values) / 30, 2.0), 100.0)
    total = weight = 0.0
    smoothed = []
    for value in values:
        total, weight = total * keep, weight * keep
        if not math.isfinite(value):
            smoothed.append(math.nan)
            continue
        total, weight = total + value, weight + 1
        smoothed.append(total / weight)
    return smoothed


def draw_training(name: str, curve: Curve) -> Figure:
    """A metric of every logged step: the raw curve faint, the smoothed one over it.

    What is set and not measured (the learning rate), and a single point, is drawn as it is.
    """
    steps, values = curve
    figure, axes = _page(name)
    marker = "o" if len(steps) <= _MANY_POINTS else ""
    if len(steps) == 1 or name == "learning_rate":
        axes.plot(
            steps, values, color=_COLORS[0], linewidth=2.0, marker=marker, markersize=5, label=_text(name)
        )
    else:
        axes.plot(steps, values, color=_COLORS[0], alpha=0.35, linewidth=1.2, marker=marker, label="raw")
        axes.plot(steps, smooth(values), color=_COLORS[0], linewidth=2.0, label="smoothed")
        axes.lines[0].set_markersize(4)
        axes.legend(frameon=False, fontsize=9)
    _fit(axes, steps)
    return figure


def draw_evaluation(name: str, series: Mapping[str, Curve]) -> Figure:
    """One metric of evaluations, a line for each data set; few points, so nothing is smoothed."""
    figure, axes = _page(name)
    for index, (label, (steps, values)) in enumerate(series.items()):
        marker = "o" if len(steps) <= _MANY_POINTS else ""
        color = _COLORS[index % len(_COLORS)]
        axes.plot(steps, values, color=color, linewidth=1.8, marker=marker, markersize=5, label=_text(label))
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=9)
    _fit(axes, [step for steps, _ in series.values() for step in steps])
    return figure


def draw_run(records: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """A figure for each file to write, by the file's name.

    All evaluation losses (`eval_loss`, `eval_<set>_loss`) share one figure; every other metric has its own.
    """
    found = curves(records)
    losses = {
        name: found.pop(name) for name in list(found) if name.startswith("eval_") and name.endswith("loss")
    }
    figures = {}
    for name, curve in found.items():
        drawn = (
            draw_evaluation(name, {name: curve}) if name.startswith("eval_") else draw_training(name, curve)
        )
        figures[_file_name(name)] = drawn
    if losses:
        figures[_file_name("eval_loss")] = draw_evaluation("eval_loss", losses)
    return figures


def plot_run(output: Path) -> list[Path]:
    """Draw the curves of the run in `output` into it, as `training_<metric>.png`; returns the files.

    Raises CheckpointError where `trainer_log.jsonl` is missing or damaged.
    """
    written = []
    for name, figure in draw_run(read_log(output / LOG_NAME)).items():
        image = BytesIO()
        figure.savefig(image, format="png", dpi="figure")
        temporary = output / f".{name}.{os.getpid()}"
        temporary.write_bytes(image.getvalue())
        os.replace(temporary, output / name)
        written.append(output / name)
    return written


def _page(name: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    title = name.removeprefix("eval_").replace("_", " ")
    axes.set_title(
        _text(f"{'Evaluation' if name.startswith('eval_') else 'Training'} {title}"), loc="left", fontsize=12
    )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(_text(title))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.ticklabel_format(axis="y", scilimits=(-3, 4))
    axes.grid(visible=True, color="#d0d7de", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _fit(axes: Axes, steps: Sequence[int]) -> None:
    """Whole steps on the axis, also where there is only one."""
    if min(steps) == max(steps):
        axes.set_xlim(min(steps) - 1, min(steps) + 1)


def _text(text: str) -> str:
    """A name as it is written: a dollar sign would begin a formula, a leading underscore hide a label."""
    return text.replace("$", r"\$").lstrip("_")


def _file_name(metric: str) -> str:
    return f"training_{re.sub(r'[^0-9A-Za-z_.-]+', '_', metric)}.png"
