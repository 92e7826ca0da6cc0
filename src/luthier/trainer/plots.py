"""The curves of a run as PNG files, drawn from its `trainer_log.jsonl`.

Only `Figure` objects are used, never `pyplot`: drawing changes no global state and needs no display.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from luthier.files import write_whole
from luthier.trainer.log import LOG_NAME, metrics, read_log, settled

COLORS = ("#1f6feb", "#d9480f", "#2b8a3e", "#9c36b5", "#b08900", "#0b7285", "#c2255c", "#495057")
MANY_POINTS = 40
"""With more points than this, a marker on each would hide the curve."""

Curve = tuple[list[int], list[float]]
"""Steps, and the value at each."""


def curves(records: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """Every metric in the log with its steps and values, in the order in which metrics first appear.

    "NaN", "Infinity" and "-Infinity" are read as numbers; they leave gaps in a curve.
    """
    found: dict[str, Curve] = {}
    for record in records:
        for name, value in metrics(record).items():
            steps, values = found.setdefault(name, ([], []))
            steps.append(record["current_steps"])
            values.append(value)
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
    marker = "o" if len(steps) <= MANY_POINTS else ""
    if len(steps) == 1 or name == "learning_rate":
        axes.plot(
            steps, values, color=COLORS[0], linewidth=2.0, marker=marker, markersize=5, label=plain_text(name)
        )
    else:
        axes.plot(steps, values, color=COLORS[0], alpha=0.35, linewidth=1.2, marker=marker, label="raw")
        axes.plot(steps, smooth(values), color=COLORS[0], linewidth=2.0, label="smoothed")
        axes.lines[0].set_markersize(4)
        axes.legend(frameon=False, fontsize=9)
    _fit(axes, steps)
    return figure


def draw_evaluation(name: str, series: Mapping[str, Curve]) -> Figure:
    """One metric of evaluations, a line for each data set; few points, so nothing is smoothed."""
    figure, axes = _page(name)
    for index, (label, (steps, values)) in enumerate(series.items()):
        marker = "o" if len(steps) <= MANY_POINTS else ""
        color = COLORS[index % len(COLORS)]
        axes.plot(
            steps, values, color=color, linewidth=1.8, marker=marker, markersize=5, label=plain_text(label)
        )
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


def plot_run(output: Path, *, unfinished: bool = False) -> list[Path]:
    """Draw the curves of the run in `output` into it, as `training_<metric>.png`; returns the files.

    unfinished: the run may be at work or was killed; see `log.read_log`.
    Raises CheckpointError where `trainer_log.jsonl` is missing or damaged.
    """
    written = []
    for name, figure in draw_run(settled(read_log(output / LOG_NAME, unfinished=unfinished))).items():
        image = BytesIO()
        figure.savefig(image, format="png", dpi="figure")
        write_whole(output / name, image.getvalue())
        written.append(output / name)
    return written


def _page(name: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    style(axes, name, "optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def style(axes: Axes, metric: str, label: str) -> None:
    """The look of a panel: titled by its metric, `label` under the horizontal axis."""
    title = metric.removeprefix("eval_").replace("_", " ")
    kind = "Evaluation" if metric.startswith("eval_") else "Training"
    axes.set_title(plain_text(f"{kind} {title}"), loc="left", fontsize=12)
    axes.set_xlabel(label)
    axes.set_ylabel(plain_text(title))
    axes.ticklabel_format(axis="y", scilimits=(-3, 4))
    axes.grid(visible=True, color="#d0d7de", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _fit(axes: Axes, steps: Sequence[int]) -> None:
    """Whole steps on the axis, also where there is only one."""
    if min(steps) == max(steps):
        axes.set_xlim(min(steps) - 1, min(steps) + 1)


def plain_text(text: str) -> str:
    """A name as it is written: a dollar sign would begin a formula, a leading underscore hide a label."""
    return text.replace("$", r"\$").lstrip("_")


def _file_name(metric: str) -> str:
    return f"training_{re.sub(r'[^0-9A-Za-z_.-]+', '_', metric)}.png"
