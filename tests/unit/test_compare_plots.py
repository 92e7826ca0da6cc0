"""Several runs in one picture: the lines hold what the runs logged, and nothing foreign is overwritten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from typer.testing import CliRunner

from luthier.cli import app
from luthier.trainer import compare_plots
from luthier.trainer.compare_plots import draw_runs, load_runs, plot_runs
from luthier.trainer.log import positions, settled
from luthier.trainer.plots import smooth
from luthier.types import CheckpointError

FAST = [
    {"current_steps": 1, "loss": 4.0, "tokens": 100, "elapsed_time": "0:00:10", "memory": 5},
    {"current_steps": 2, "loss": 2.0, "tokens": 250, "elapsed_time": "0:00:20", "memory": 6},
    {"current_steps": 2, "eval_loss": 3.0, "tokens": 250, "elapsed_time": "0:00:30"},
    {"current_steps": 3, "loss": 1.0, "tokens": 300, "elapsed_time": "0:00:40", "memory": 6},
    {"current_steps": 3, "eval_loss": 2.5, "tokens": 300, "elapsed_time": "0:00:50", "eval_accuracy": 0.5},
]
SLOW = [
    {"current_steps": 10, "loss": 5.0, "tokens": 90, "elapsed_time": "0:03:00"},
    {"current_steps": 20, "loss": 3.0, "tokens": 180, "elapsed_time": "0:06:00"},
]


def write_run(folder: Path, records: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "trainer_log.jsonl").write_text(lines)
    return folder


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.chdir(tmp_path)
    return [write_run(Path("runs/fast"), FAST), write_run(Path("runs/slow"), SLOW)]


def drawn(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    return {
        str(line.get_label()): (np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist())
        for line in axes.lines
    }


def legend(figure: Figure) -> list[str]:
    (found,) = figure.legends
    return [text.get_text() for text in found.get_texts()]


# --------------------------------------------------------------------------------------------------
# What is drawn


def test_losses_of_all_runs_over_steps(runs: list[Path]) -> None:
    figure = draw_runs(load_runs(runs), ["loss", "eval_loss"], "steps")
    training, evaluation = figure.axes
    assert drawn(training) == {
        "fast (raw)": ([1, 2, 3], [4, 2, 1]),
        "fast": ([1, 2, 3], smooth([4, 2, 1])),
        "slow (raw)": ([10, 20], [5, 3]),
        "slow": ([10, 20], smooth([5, 3])),
    }
    # the formula of `smooth` with the smallest window, 2: weights 1/2 and 1
    assert drawn(training)["slow"][1] == pytest.approx([5, (5 / 2 + 3) / (1 / 2 + 1)])
    assert drawn(evaluation) == {"fast": ([2, 3], [3, 2.5])}
    assert legend(figure) == ["fast", "slow"]
    assert (training.get_title(loc="left"), training.get_xlabel()) == ("Training loss", "optimizer step")
    assert (evaluation.get_title(loc="left"), evaluation.get_ylabel()) == ("Evaluation loss", "loss")


def test_each_run_keeps_its_colour_and_its_raw_curve_is_faint(runs: list[Path]) -> None:
    figure = draw_runs(load_runs(runs), ["loss", "eval_loss"], "steps")
    training, evaluation = figure.axes
    raw, smoothed, other_raw, other = training.lines
    assert raw.get_color() == smoothed.get_color() == evaluation.lines[0].get_color()
    assert other_raw.get_color() == other.get_color() != raw.get_color()
    assert raw.get_alpha() == 0.25 and smoothed.get_alpha() is None
    assert [line.get_color() for line in figure.legends[0].get_lines()] == [
        raw.get_color(),
        other.get_color(),
    ]


def test_more_runs_than_colours_are_told_apart(tmp_path: Path) -> None:
    many = [write_run(tmp_path / f"run-{at}", SLOW) for at in range(20)]
    figure = draw_runs(load_runs(many), ["loss"], "steps")
    looks = {
        (line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines if line.get_alpha() is None
    }
    assert len(looks) == 20


def test_tokens_and_time(runs: list[Path]) -> None:
    logs = load_runs(runs)
    tokens = draw_runs(logs, ["loss"], "tokens").axes[0]
    assert drawn(tokens)["fast (raw)"] == ([100, 250, 300], [4, 2, 1])
    assert drawn(tokens)["slow (raw)"] == ([90, 180], [5, 3])
    assert tokens.get_xlabel() == "tokens"
    time = draw_runs(logs, ["loss"], "time").axes[0]
    assert time.get_xlabel() == "time (minutes)"  # the longer run took six
    assert drawn(time)["slow (raw)"] == ([3, 6], [5, 3])
    assert drawn(time)["fast (raw)"][0] == pytest.approx([10 / 60, 20 / 60, 40 / 60])
    short = draw_runs(logs[:1], ["loss"], "time").axes[0]
    assert (short.get_xlabel(), drawn(short)["fast (raw)"][0]) == ("time (seconds)", [10, 20, 40])


def test_any_number_in_the_log_can_be_drawn(runs: list[Path]) -> None:
    figure = draw_runs(load_runs(runs), ["memory", "eval_accuracy", "loss"], "steps")
    memory, accuracy, loss = figure.axes
    assert drawn(memory) == {"fast": ([1, 2, 3], [5, 6, 6])}  # counted, not measured: not smoothed
    assert drawn(accuracy) == {"fast": ([3], [0.5])}
    assert set(drawn(loss)) == {"fast (raw)", "fast", "slow (raw)", "slow"}


def test_names_tell_equal_folders_apart(tmp_path: Path) -> None:
    pair = [write_run(tmp_path / parent / "run", SLOW) for parent in ("a", "b")]
    assert [log.name for log in load_runs(pair)] == ["a/run", "b/run"]
    more = [*pair, write_run(tmp_path / "c", SLOW)]
    assert len({log.name for log in load_runs(more)}) == 3


# --------------------------------------------------------------------------------------------------
# Resumed runs


def test_time_goes_on_where_a_resumed_run_went_on() -> None:
    records = [
        {"current_steps": 2, "elapsed_time": "0:00:20"},
        {"current_steps": 4, "elapsed_time": "0:00:40"},
        # this process took longer to its first line than the one before to its last
        {"current_steps": 6, "elapsed_time": "0:00:50", "resumed_from": 4},
        {"current_steps": 8, "elapsed_time": "0:01:00", "resumed_from": 4},
        {"current_steps": 10, "elapsed_time": "1:00:05", "resumed_from": 8},
        {"current_steps": 10, "eval_loss": 1.0},
    ]
    assert positions(records, "time") == [20, 40, 90, 100, 3705, None]
    # a log from before `resumed_from`: a clock that goes back is a new process
    older = [{**record, "resumed_from": 0} for record in records[:1]] + [
        {"current_steps": 3, "elapsed_time": "0:00:05", "resumed_from": 0}
    ]
    assert positions(older, "time") == [20, 25]
    assert positions([{"current_steps": 0}, {"current_steps": 1, "tokens": 7}], "tokens") == [0, 7]


def test_what_a_run_took_back_is_not_drawn() -> None:
    steps = [(2, "a"), (4, "b"), (4, "b-eval"), (6, "c"), (8, "d"), (6, "c2"), (6, "c2-eval"), (8, "d2")]
    kept = settled([{"current_steps": step, "line": name} for step, name in steps])
    assert [record["line"] for record in kept] == ["a", "b", "b-eval", "c2", "c2-eval", "d2"]


def test_a_run_at_work_is_drawn_without_its_unfinished_line(runs: list[Path]) -> None:
    with (runs[1] / "trainer_log.jsonl").open("a") as stream:
        stream.write('{"current_steps": 30, "lo')
    assert load_runs(runs)[1].curve("loss", "steps") == ([10, 20], [5, 3])
    assert [file.name for file in plot_runs(runs[1:])] == ["training_loss.png"]


# --------------------------------------------------------------------------------------------------
# Files


def plot(*words: object) -> Any:
    return CliRunner().invoke(app, ["plot", *map(str, words)])


def test_one_run_draws_into_its_own_folder(runs: list[Path]) -> None:
    result = plot(runs[0])
    files = ["training_loss.png", "training_eval_accuracy.png", "training_eval_loss.png"]
    assert result.exit_code == 0
    assert result.stdout.split() == [str(runs[0] / name) for name in files]
    assert {path.name for path in runs[0].iterdir()} == {*files, "trainer_log.jsonl"}
    assert plot(runs[0]).exit_code == 0  # they are the run's own pictures
    assert plot(runs[0], "--output", "one.png").stdout == "one.png\n"
    assert sorted(path.name for path in Path().iterdir()) == ["one.png", "runs"]


@pytest.mark.parametrize(
    ("name", "start"), [("a.png", b"\x89PNG\r\n\x1a\n"), ("a.SVG", b"<?xml"), ("a.pdf", b"%PDF-")]
)
def test_its_own_file_is_drawn_again_and_a_foreign_one_only_on_request(
    runs: list[Path], name: str, start: bytes
) -> None:
    assert plot(*runs, "--output", name).stdout == f"{name}\n"
    first = Path(name).read_bytes()
    assert first.startswith(start)
    assert plot(*runs, "-m", "memory", "--output", name).exit_code == 0
    assert Path(name).read_bytes() != first
    Path(name).write_bytes(start + b"a photograph")
    refused = plot(*runs, "--output", name)
    assert refused.exit_code == 2
    assert refused.stderr == (
        f"error: {name} is there already and was not drawn by `luthier plot`; "
        f"name another file with --output, or add --overwrite\n"
    )
    assert Path(name).read_bytes() == start + b"a photograph"
    assert plot(*runs, "--output", name, "--overwrite").exit_code == 0
    assert compare_plots.MARK.encode() in Path(name).read_bytes()
    assert sorted(path.name for path in Path().iterdir()) == sorted([name, "runs"])


def test_the_default_output(runs: list[Path]) -> None:
    assert plot(*runs, "--x", "tokens").stdout == "runs.png\n"
    assert Path("runs.png").exists()


# --------------------------------------------------------------------------------------------------
# What cannot be drawn


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs/none"], "runs/none: no such folder"),
        (["runs/fast", "runs/none"], "runs/none: no such folder"),
        (["runs"], "runs is not a run: it has neither trainer_log.jsonl nor recipe.yaml"),
        (["runs/fast/trainer_log.jsonl"], "runs/fast/trainer_log.jsonl is a file; give the folder of a run"),
        (["runs/begun"], "runs/begun: no log line yet; the first comes after train.log_every steps"),
        (["runs/fast", "runs/slow/../fast"], "runs/slow/../fast is given twice"),
        (["runs/fast", "-m", "lss"], "--metric lss: no run has logged it; there is "
         "loss, tokens, memory, eval_loss, eval_accuracy"),
        (["runs/slow", "-m", "eval_loss"], "--metric eval_loss: no run has logged it; there is loss, tokens"),
        (["runs/bare", "-o", "x.png"], "no loss is logged here; choose with --metric from reward"),
        (["runs/bare", "-m", "reward", "--x", "time"], "--x time: no line with reward says where it stands; "
         "use --x steps"),
        (["runs/fast", "-o", "x.jpg"], "--output x.jpg: name a file that ends in .png, .svg, .pdf"),
        (["runs/fast", "-o", "no/x.png"], "--output no/x.png: there is no folder no"),
        (["runs/fast", "-o", "folder.png"], "--output folder.png: is a folder; name a file"),
        (["runs/broken", "runs/fast"], "runs/broken/trainer_log.jsonl, line 2 has no whole number "
         "`current_steps`: '[1]'"),
    ],
)  # fmt: skip
def test_faults_are_named_and_nothing_is_written(runs: list[Path], words: list[str], message: str) -> None:
    write_run(Path("runs/bare"), [{"current_steps": 1, "reward": 0.5}])
    write_run(Path("runs/broken"), [{"current_steps": 1}, [1]])  # type: ignore[list-item]
    Path("runs/begun").mkdir()
    Path("runs/begun/recipe.yaml").touch()
    Path("folder.png").mkdir()
    before = sorted(Path().rglob("*"))
    result = plot(*words)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"error: {message}\n")
    assert sorted(Path().rglob("*")) == before


def test_an_empty_log_is_a_run_without_lines(runs: list[Path]) -> None:
    (runs[0] / "trainer_log.jsonl").write_text("")
    with pytest.raises(CheckpointError, match="no log line yet"):
        plot_runs(runs)


def test_an_unknown_axis_is_a_usage_error(runs: list[Path]) -> None:
    assert plot(*runs, "--x", "days").exit_code == 2
