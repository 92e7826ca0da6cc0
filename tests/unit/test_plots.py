"""The curves of a run: what is drawn is what was logged."""

from __future__ import annotations

import json
import math
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from luthier.trainer.plots import draw_run, plot_run, read_log, smooth
from luthier.types import CheckpointError


def write_log(output: Path, records: list[dict[str, Any]]) -> Path:
    path = output / "trainer_log.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def axes_of(figure: Figure) -> Axes:
    (axes,) = figure.axes
    return axes


def drawn(figure: Figure) -> dict[str, tuple[list[float], list[float]]]:
    return {
        str(line.get_label()): (np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist())
        for line in axes_of(figure).lines
    }


RECORDS: list[dict[str, Any]] = [
    {
        "current_steps": 10,
        "loss": 3.0,
        "learning_rate": 2e-4,
        "epoch": 0.5,
        "tokens": 5,
        "elapsed_time": "0:00:01",
    },
    {"current_steps": 10, "eval_loss": 2.5, "eval_runtime": 1.0, "eval_a_loss": 2.0, "eval_perplexity": 12.0},
    {"current_steps": 20, "loss": 2.0, "learning_rate": 1e-4, "memory": 9, "rewards/chosen": 0.5},
    {"current_steps": 30, "loss": 1.0, "learning_rate": 0.0},
    {"current_steps": 30, "eval_loss": 1.5, "eval_a_loss": 1.0, "eval_perplexity": 4.0},
    {"current_steps": 30, "train_loss": 2.0, "train_runtime": 3.0, "train_steps_per_second": 1.0},
]


def test_what_is_drawn_is_what_was_logged() -> None:
    figures = draw_run(RECORDS)
    assert sorted(figures) == [
        "training_eval_loss.png",
        "training_eval_perplexity.png",
        "training_learning_rate.png",
        "training_loss.png",
        "training_rewards_chosen.png",
    ]
    # window 2: weights 1/4, 1/2, 1 on the three values
    second, third = (3 / 2 + 2) / (1 / 2 + 1), (3 / 4 + 2 / 2 + 1) / (1 / 4 + 1 / 2 + 1)
    loss = drawn(figures["training_loss.png"])
    assert loss["raw"] == ([10, 20, 30], [3.0, 2.0, 1.0])
    assert loss["smoothed"][0] == [10, 20, 30]
    assert loss["smoothed"][1] == pytest.approx([3.0, second, third], rel=1e-12)
    assert drawn(figures["training_eval_loss.png"]) == {
        "eval_loss": ([10, 30], [2.5, 1.5]),
        "eval_a_loss": ([10, 30], [2.0, 1.0]),
    }
    assert drawn(figures["training_eval_perplexity.png"]) == {"eval_perplexity": ([10, 30], [12.0, 4.0])}
    assert drawn(figures["training_learning_rate.png"]) == {
        "learning_rate": ([10, 20, 30], [2e-4, 1e-4, 0.0])
    }
    assert drawn(figures["training_rewards_chosen.png"]) == {"rewards/chosen": ([20], [0.5])}


def test_the_raw_curve_is_faint_and_the_axes_are_named() -> None:
    figures = draw_run(RECORDS)
    raw, smoothed = axes_of(figures["training_loss.png"]).lines
    assert raw.get_alpha() == 0.35
    assert smoothed.get_alpha() is None
    assert raw.get_color() == smoothed.get_color()
    assert smoothed.get_linewidth() > raw.get_linewidth()
    axes = axes_of(figures["training_eval_loss.png"])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer step", "loss")
    assert axes.get_title(loc="left") == "Evaluation loss"
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["eval_loss", "eval_a_loss"]


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", header[16:])
    return width, height


def test_the_files_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(
        sys.modules, "matplotlib.pyplot", raising=False
    )  # which another test may have imported
    write_log(tmp_path, RECORDS)
    written = plot_run(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([*written, tmp_path / "trainer_log.jsonl"])
    assert {path.name for path in written} == set(draw_run(RECORDS))
    assert {png_size(path) for path in written} == {(1200, 675)}
    assert "matplotlib.pyplot" not in sys.modules


def test_a_log_of_one_point(tmp_path: Path) -> None:
    write_log(tmp_path, [{"current_steps": 7, "loss": 2.0}])
    figure = draw_run(read_log(tmp_path / "trainer_log.jsonl"))["training_loss.png"]
    assert drawn(figure) == {"loss": ([7], [2.0])}
    assert axes_of(figure).lines[0].get_marker() == "o"
    assert axes_of(figure).get_xlim() == (6.0, 8.0)
    assert [path.name for path in plot_run(tmp_path)] == ["training_loss.png"]


def test_numbers_that_are_not_finite_leave_gaps(tmp_path: Path) -> None:
    values = [3.0, "NaN", 1.0, "Infinity"]
    write_log(tmp_path, [{"current_steps": step, "loss": value} for step, value in enumerate(values)])
    figure = draw_run(read_log(tmp_path / "trainer_log.jsonl"))["training_loss.png"]
    _, raw = drawn(figure)["raw"]
    _, smoothed = drawn(figure)["smoothed"]
    np.testing.assert_array_equal(raw, [3.0, math.nan, 1.0, math.inf])
    np.testing.assert_allclose(smoothed, [3.0, math.nan, (3 / 4 + 1) / (1 / 4 + 1), math.nan], rtol=1e-12)
    assert png_size(plot_run(tmp_path)[0]) == (1200, 675)


def test_names_that_would_mean_something_to_the_drawing_library(tmp_path: Path) -> None:
    name = "eval__a$\\frac$_loss"
    write_log(
        tmp_path, [{"current_steps": 1, name: 1.0, "eval_loss": 2.0}, {"current_steps": 2, "_x/$y$": 1.0}]
    )
    assert [path.name for path in plot_run(tmp_path)] == ["training__x_y_.png", "training_eval_loss.png"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"trainer_log\.jsonl does not exist"),
        ("", r"trainer_log\.jsonl is empty"),
        ('{"current_steps": 1}\n{"current_st', r"trainer_log\.jsonl, line 2 is not JSON"),
        ('{"current_steps": 1}\n\n{"current_steps": 2}\n', r"line 2 is not JSON"),
        ("[1]\n", r"line 1 has no whole number `current_steps`"),
        ('{"loss": 2.0}\n', r"line 1 has no whole number `current_steps`"),
        ('{"current_steps": 1.5}\n', r"line 1 has no whole number `current_steps`"),
    ],
)
def test_a_log_that_cannot_be_read_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "trainer_log.jsonl").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        plot_run(tmp_path)
    assert list(tmp_path.glob("*.png")) == []


# --------------------------------------------------------------------------------------------------
# Smoothing


@given(st.lists(st.floats(-1e6, 1e6), max_size=400))
def test_smoothing_is_the_weighted_mean_of_its_formula(values: list[float]) -> None:
    keep = 1 - 1 / min(max(len(values) / 30, 2.0), 100.0)
    expected = []
    for t in range(len(values)):
        weights = keep ** np.arange(t, -1, -1.0)
        expected.append(float(np.average(values[: t + 1], weights=weights)))
    np.testing.assert_allclose(smooth(values), expected, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 61, 5000])
def test_a_constant_stays_itself_from_the_first_value_on(count: int) -> None:
    assert smooth([0.7] * count) == pytest.approx([0.7] * count, rel=1e-12)


def test_the_window_follows_the_length_between_its_bounds() -> None:
    def kept(count: int) -> float:
        """The weight of the first value in the second average, over that of the second."""
        average = smooth([1.0, *[0.0] * (count - 1)])[1]
        return average / (1 - average)

    assert [kept(count) for count in (2, 60, 300, 3000, 9000)] == pytest.approx(
        [1 / 2, 1 / 2, 0.9, 0.99, 0.99]
    )
