"""Several runs in one picture: `luthier plot`.

A panel for each metric, a colour for each run. What is measured at every logged step is drawn faint and, over it,
smoothed with the formula of `plots.smooth`; evaluations are drawn as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import cycle, product
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from luthier.files import write_whole
from luthier.trainer.log import LOG_NAME, Axis, number, positions, read_log, settled
from luthier.trainer.plots import COLORS, MANY_POINTS, plain_text, plot_run, smooth, style
from luthier.types import CheckpointError

DEFAULT_OUTPUT = Path("runs.png")
DEFAULT_METRICS = ("loss", "eval_loss")
REWARD_METRICS = ("accuracy", "rewards/accuracies", "rewards/margins")
"""Drawn beside the losses, of training and of evaluations, where a run has rewards."""
FORMATS = {".png": "Software", ".svg": "Creator", ".pdf": "Creator"}
"""The kinds of file, and under which name each keeps the mark of who drew it."""

MARK = "luthier plot"
_READ_AS_MARKED = 32 * 2**20
"""Bytes: nothing that is drawn here comes near, so a larger file is somebody else's and is not read."""

_DRAWN_AS_IT_IS = frozenset(
    {"learning_rate", "epoch", "percentage", "tokens", "memory", "total_steps", "resumed_from", "train_loss"}
)
LineStyle = Literal["solid", "dashed", "dotted", "dashdot"]
_LINES: tuple[LineStyle, ...] = ("solid", "dashed", "dotted", "dashdot")


@dataclass(frozen=True, slots=True)
class RunLog:
    """A run's name in the legend and its log lines, each step once."""

    name: str
    records: list[dict[str, Any]]

    def curve(self, metric: str, axis: Axis) -> tuple[list[float], list[float]]:
        """Where the run logged a metric, and what; empty lists where it never did."""
        places, values = [], []
        for record, place in zip(self.records, positions(self.records, axis), strict=True):
            value = number(record.get(metric))
            if value is not None and place is not None:
                places.append(place)
                values.append(value)
        return places, values

    def keys(self) -> list[str]:
        """Everything that it logged as a number."""
        found = {name: None for record in self.records for name in record if number(record[name]) is not None}
        return [name for name in found if name != "current_steps"]


def plot_runs(
    runs: Sequence[Path],
    *,
    metrics: Sequence[str] = (),
    axis: Axis = "steps",
    output: Path | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Draw runs and return the files written.

    One run and nothing else said: the pictures that training draws at its end, in the run's folder. Else one
    picture of `metrics` (the losses of training and of evaluations; with rewards their accuracies and margins too)
    in `output` (`runs.png`; .svg and .pdf by its ending). Raises CheckpointError, before anything is written, for a
    folder that is no run or has no log line yet, a metric that no run logged, and an `output` that is in the way.
    """
    logs = load_runs(runs)
    if len(runs) == 1 and not metrics and axis == "steps" and output is None:
        return plot_run(runs[0], unfinished=True)
    target = DEFAULT_OUTPUT if output is None else output
    _check_output(target, overwrite)
    figure = draw_runs(logs, _chosen(logs, metrics), axis)
    image = BytesIO()
    kind = target.suffix.lower()
    figure.savefig(image, format=kind[1:], dpi="figure", metadata={FORMATS[kind]: MARK})
    write_whole(target, image.getvalue())
    return [target]


def load_runs(runs: Sequence[Path]) -> list[RunLog]:
    """The logs of run folders, in their order. Raises CheckpointError that names a folder without one."""
    resolved = [run.resolve() for run in runs]
    for at, folder in enumerate(resolved):
        if folder in resolved[:at]:
            raise CheckpointError(f"{runs[at]} is given twice")
    loaded = []
    for run, name in zip(runs, _names(resolved), strict=True):
        if not run.exists():
            raise CheckpointError(f"{run}: no such folder")
        if not run.is_dir():
            raise CheckpointError(f"{run} is a file; give the folder of a run")
        log = run / LOG_NAME
        if not log.exists() and not (run / "recipe.yaml").exists():
            raise CheckpointError(f"{run} is not a run: it has neither {LOG_NAME} nor recipe.yaml")
        if not log.exists() or not log.read_text(encoding="utf-8", errors="replace").strip():
            raise CheckpointError(f"{run}: no log line yet; the first comes after train.log_every steps")
        loaded.append(RunLog(name, settled(read_log(log, unfinished=True))))
    return loaded


def _names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, and as many before it as tell all of them apart."""
    longest = max(len(folder.parts) for folder in folders)
    names = [folder.name for folder in folders]
    for count in range(2, longest + 1):
        if len(set(names)) == len(names):
            break
        names = [str(Path(*folder.parts[-count:])) for folder in folders]
    return names


def _chosen(logs: Sequence[RunLog], wanted: Sequence[str]) -> list[str]:
    """The metrics to draw. Raises CheckpointError, with a list of what there is, for one that no run logged."""
    there = list(dict.fromkeys(name for log in logs for name in log.keys()))  # noqa: SIM118
    if not wanted:
        rewards = REWARD_METRICS if any("rewards/" in name for name in there) else ()
        both = [name for metric in rewards for name in (metric, f"eval_{metric}")]
        found = [name for name in (*DEFAULT_METRICS, *both) if name in there]
        if found:
            return found
        raise CheckpointError(f"no loss is logged here; choose with --metric from {', '.join(there)}")
    for name in wanted:
        if name not in there:
            raise CheckpointError(f"--metric {name}: no run has logged it; there is {', '.join(there)}")
    return list(dict.fromkeys(wanted))


def _check_output(output: Path, overwrite: bool) -> None:
    if output.suffix.lower() not in FORMATS:
        raise CheckpointError(f"--output {output}: name a file that ends in {', '.join(FORMATS)}")
    if not output.parent.is_dir():
        raise CheckpointError(f"--output {output}: there is no folder {output.parent}")
    if output.is_dir():
        raise CheckpointError(f"--output {output}: is a folder; name a file")
    if output.exists() and not overwrite and not _is_ours(output):
        raise CheckpointError(
            f"{output} is there already and was not drawn by `luthier plot`; "
            f"name another file with --output, or add --overwrite"
        )


def _is_ours(file: Path) -> bool:
    return file.stat().st_size <= _READ_AS_MARKED and MARK.encode() in file.read_bytes()


def draw_runs(logs: Sequence[RunLog], metrics: Sequence[str], axis: Axis) -> Figure:
    """A panel for each metric, a line for each run, one legend.

    Raises CheckpointError where no run says how many tokens or how much time a value took.
    """
    columns = min(len(metrics), 2)
    rows = math.ceil(len(metrics) / columns)
    figure = Figure(figsize=(8 if columns == 1 else 12, 4.5 * rows), dpi=150, layout="constrained")
    scale, label = _unit(logs, axis)
    styles = [(color, line) for line, color in product(_LINES, COLORS)]
    for at, metric in enumerate(metrics, start=1):
        axes = figure.add_subplot(rows, columns, at)
        style(axes, metric, label)
        for log, (color, line) in zip(logs, cycle(styles), strict=False):
            places, values = log.curve(metric, axis)
            _draw(axes, metric, log.name, ([place / scale for place in places], values), color, line)
        if not axes.lines:
            raise CheckpointError(f"--x {axis}: no line with {metric} says where it stands; use --x steps")
        if axis == "steps":
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))
    handles = [
        Line2D([], [], color=color, linestyle=line, linewidth=2.0, label=plain_text(log.name))
        for log, (color, line) in zip(logs, cycle(styles), strict=False)
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(logs), 4), frameon=False, fontsize=9
    )
    return figure


def _draw(
    axes: Axes, metric: str, run: str, curve: tuple[list[float], list[float]], color: str, line: LineStyle
) -> None:
    places, values = curve
    if not values:
        return
    marker = "o" if len(values) <= MANY_POINTS else ""
    name = plain_text(run)
    if metric.startswith("eval_") or metric in _DRAWN_AS_IT_IS or len(values) == 1:
        axes.plot(
            places,
            values,
            color=color,
            linestyle=line,
            linewidth=1.8,
            marker=marker,
            markersize=4,
            label=name,
        )
        return
    axes.plot(places, values, color=color, linestyle=line, alpha=0.25, linewidth=1.0, label=f"{name} (raw)")
    axes.plot(places, smooth(values), color=color, linestyle=line, linewidth=2.0, label=name)


def _unit(logs: Sequence[RunLog], axis: Axis) -> tuple[float, str]:
    """What the places of an axis are divided by, and its label."""
    if axis == "steps":
        return 1, "optimizer step"
    if axis == "tokens":
        return 1, "tokens"
    longest = max((place or 0.0 for log in logs for place in positions(log.records, "time")), default=0.0)
    for seconds, name in ((3600, "hours"), (60, "minutes")):
        if longest >= 3 * seconds:
            return seconds, f"time ({name})"
    return 1, "time (seconds)"
