"""A sweep over trials that take no time: a stand-in for `luthier train` that reads the same words and writes the
same files. What is recorded, kept, gone on with and stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from luthier.cli import app
from luthier.recipe.load import load_recipe
from luthier.sweep import run as verb, trial as process
from luthier.sweep.run import sweep
from luthier.trainer.log import LOG_NAME
from luthier.types import CheckpointError, LuthierError, RunInterrupted

TRAIN = """
import json, math, os, pathlib, sys, time
words = dict(word.split("=", 1) for word in sys.argv[2:])
out = pathlib.Path(words["train.output"])
out.mkdir(parents=True, exist_ok=True)
rate, rank = float(words.get("optim.lr", 1)), int(words.get("method.rank", 4))
# the best is at lr 0.1, rank 8
final = 1 + abs(math.log10(rate) + 1) + abs(rank - 8) / 16
(out / "started").open("a").write("x")
behaviour = os.environ.get("TRIAL_" + out.name[-3:], "")
print("training", out.name, flush=True)
with (out / "trainer_log.jsonl").open("w") as log:
    for step in range(1, 6):
        value = final + (5 - step)
        log.write(json.dumps({"current_steps": step, "total_steps": 5, "eval_loss": value}) + "\\n")
        log.flush()
        time.sleep(float(os.environ.get("STEP", 0)))
if behaviour == "crash":
    print("Traceback (most recent call last):\\n  ...\\ntorch.OutOfMemoryError: CUDA out of memory\\n", flush=True)
    sys.exit(1)
if behaviour == "killed":
    os.kill(os.getpid(), 9)
if behaviour == "wait":
    time.sleep(60)
(out / "adapter_model.safetensors").write_text("weights")
(out / "checkpoint-5").mkdir(exist_ok=True)
(out / "recipe.yaml").write_text(json.dumps(words))
results = {"train_loss": 9.0, "eval_loss": float("nan") if behaviour == "nan" else final}
if behaviour == "silent":
    del results["eval_loss"]
(out / "all_results.json").write_text(json.dumps(results))
"""

GRID = """
recipe: base.yaml
space:
  optim.lr: [0.01, 0.1]
  method.rank: [4, 8]
output: out
"""
OPTUNA = """
recipe: base.yaml
search: {type: optuna, trials: 12, seed: 3, startup_trials: 4}
space:
  optim.lr: {low: 0.001, high: 1.0, log: true}
  method.rank: {low: 2, high: 32}
  data.shuffle: [true, false]
output: out
"""
PRUNED = """
recipe: base.yaml
search: {type: optuna, trials: 8, seed: 1, pruner: median, prune_after_trials: 2}
space:
  optim.lr: {low: 0.001, high: 1.0, log: true}
output: out
overrides: [train.eval_every=1]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("model: {path: embedded}\ndata: {train: [a], dev_split: 0.1}\n")
    Path("train.py").write_text(TRAIN)
    real = process.command

    def command(recipe: Path, words: Sequence[str], output: Path, metric: str) -> list[str]:
        python, _, _, verb_, *rest = real(recipe, words, output, metric)
        assert verb_ == "train"
        return [python, str(tmp_path / "train.py"), *rest]

    monkeypatch.setattr(verb, "command", command)
    return tmp_path


def write(text: str) -> Path:
    Path("s.yaml").write_text(text)
    return Path("s.yaml")


def lines(folder: str = "out") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "trials.jsonl").read_text().splitlines()]


def starts(number: int) -> int:
    """How often a trial was started."""
    file = Path(f"out/trial-{number:03d}/started")
    return len(file.read_text()) if file.exists() else 0


def without_time(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


# --------------------------------------------------------------------------------------------------
# What is recorded and kept


def test_a_grid_is_recorded_and_its_best_found(capsys: pytest.CaptureFixture[str]) -> None:
    result = sweep(write(GRID))
    expected = [(0.01, 4, 2.25), (0.01, 8, 2.0), (0.1, 4, 1.25), (0.1, 8, 1.0)]
    assert [(*line["params"].values(), line["value"]) for line in lines()] == expected
    assert [line["trial"] for line in lines()] == [1, 2, 3, 4]
    assert {line["status"] for line in lines()} == {"done"}
    assert all(0 < line["seconds"] < 30 for line in lines())
    assert (result.best.trial, result.best.value, result.output) == (4, 1.0, Path("out"))
    assert sorted(path.name for path in Path("out").iterdir()) == sorted(
        ["sweep.json", "trials.jsonl", "best.yaml"]
        + [f"trial-00{number}{end}" for number in (1, 2, 3, 4) for end in ("", ".log")]
    )
    shown = capsys.readouterr().out
    rows = re.findall(r"trial-00(\d) +│ +([\d.]+) │ +(\d) │ +([\d.]+) │ done", shown)
    assert rows == [("4", "0.1", "8", "1"), ("3", "0.1", "4", "1.25"), ("2", "0.01", "8", "2"), ("1", "0.01", "4", "2.25")]  # fmt: skip
    assert (
        "best: trial-004, eval_loss 1\n  its weights are in out/trial-004; its recipe is out/best.yaml"
        in shown
    )


def test_each_trial_is_given_the_words_of_its_own(folder: Path) -> None:
    sweep(write(GRID + "overrides: [train.max_steps=20]\n"), quiet=True)
    assert json.loads(Path("out/trial-002/recipe.yaml").read_text()) == {
        "train.max_steps": "20", "optim.lr": "0.01", "method.rank": "8", "train.output": "out/trial-002",
        "train.resume": "auto", "train.overwrite": "false", "train.push_to_hub": "null",
    }  # fmt: skip
    assert Path("out/trial-002.log").read_text() == "training trial-002\n"


def test_a_trial_judged_by_its_training_begins_anew() -> None:
    """`train_loss` of a resumed run is the mean since it was resumed."""
    sweep(write(GRID + "metric: train_loss\n"), quiet=True)
    words = json.loads(Path("out/trial-002/recipe.yaml").read_text())
    assert (words["train.resume"], words["train.overwrite"]) == ("never", "true")


def test_the_best_recipe_is_complete_and_loads(folder: Path) -> None:
    with Path("base.yaml").open("a") as stream:
        stream.write("train: {push_to_hub: {repo: a/b}}\n")
    sweep(write(GRID + "overrides: [train.max_steps=20]\n"), quiet=True)
    text = Path("out/best.yaml").read_text()
    assert text.startswith("# The best of 4 trials of s.yaml: trial-004, eval_loss 1\n")
    assert "  lr: 0.1  # sweep, trial-004\n" in text
    best = load_recipe("out/best.yaml").recipe
    direct = load_recipe(
        "base.yaml", ["train.max_steps=20", "optim.lr=0.1", "method.rank=8", "train.output=out/best"]
    ).recipe
    assert best == direct
    assert best.train.push_to_hub is not None  # the trials did not upload; the best may


@pytest.mark.parametrize(("keep", "kept"), [("best", [4]), ("all", [1, 2, 3, 4])])
def test_weights_of_the_others_go(keep: str, kept: list[int]) -> None:
    sweep(write(GRID + f"keep: {keep}\n"), quiet=True)
    for number in (1, 2, 3, 4):
        there = {path.name for path in Path(f"out/trial-00{number}").iterdir()}
        weights = {"adapter_model.safetensors", "checkpoint-5"} if number in kept else set()
        assert there == {"started", "recipe.yaml", "all_results.json", "trainer_log.jsonl", *weights}


def test_a_number_to_maximize() -> None:
    assert sweep(write(GRID + "direction: maximize\n"), quiet=True).best.trial == 1


def test_the_earliest_of_equals_is_the_best() -> None:
    text = "recipe: base.yaml\nspace: {method.rank: [4, 12], data.shuffle: [true]}\noutput: out\n"
    result = sweep(write(text), quiet=True)
    assert [trial.value for trial in result.trials] == [2.25, 2.25]
    assert result.best.trial == 1


# --------------------------------------------------------------------------------------------------
# Trials that fail


def test_failed_trials_are_recorded_and_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRIAL_004", "crash")
    monkeypatch.setenv("TRIAL_002", "nan")
    monkeypatch.setenv("TRIAL_001", "killed")
    result = sweep(write(GRID))
    assert [(line["status"], line["value"]) for line in lines()] == [
        ("failed", None), ("failed", None), ("done", 1.25), ("failed", None),
    ]  # fmt: skip
    errors = [line["error"] for line in lines()]
    assert errors == [
        "killed by SIGKILL; often the system, when memory is full",
        "eval_loss is nan",
        None,
        "torch.OutOfMemoryError: CUDA out of memory",
    ]
    assert result.best.trial == 3
    assert "trial-004: torch.OutOfMemoryError: CUDA out of memory" in capsys.readouterr().out


def test_a_trial_without_the_metric_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIAL_003", "silent")
    sweep(write(GRID), quiet=True)
    assert lines()[2]["error"] == "it ended without eval_loss; there is train_loss"


def test_where_none_ends_well_the_sweep_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2, 3, 4):
        monkeypatch.setenv(f"TRIAL_00{number}", "crash")
    write(GRID)
    result = CliRunner().invoke(app, ["sweep", "--quiet", "s.yaml"])
    assert result.exit_code == 2
    assert result.stderr == (
        "error: no trial ended well; the last one: torch.OutOfMemoryError: CUDA out of memory "
        "(see out/trial-004.log)\n"
    )
    assert not Path("out/best.yaml").exists()


# --------------------------------------------------------------------------------------------------
# Going on


SWEEP = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell starts without it
from luthier.sweep import run, trial

real = trial.command
run.command = lambda *words: [sys.executable, "train.py", *real(*words)[4:]]
from luthier.cli import app
app(["sweep", "--quiet", "s.yaml"])
"""


def start_sweep(**environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", SWEEP],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        stderr=subprocess.PIPE,
    )


def wait_for(file: Path, text: str = "", seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not (file.exists() and text in file.read_text()):
        assert time.monotonic() < deadline, f"{file} did not come"
        time.sleep(0.02)


@pytest.mark.parametrize("text", [GRID, OPTUNA], ids=["grid", "optuna"])
def test_killed_and_started_again_it_goes_on(text: str) -> None:
    straight = sweep(write(text.replace("output: out", "output: straight")), quiet=True)
    write(text)
    working = start_sweep(TRIAL_003="wait")
    wait_for(Path("out/trial-003.log"), "training")
    working.kill()
    working.wait()
    assert len(lines()) == 2
    # its trial is still at work: nobody else may begin
    with pytest.raises(CheckpointError, match=r"process \d+ is at work in out; wait for it, or end it first"):
        sweep(Path("s.yaml"), quiet=True)
    (orphan,) = [
        number for number, _ in json.loads(Path("out/running.json").read_text()) if number != working.pid
    ]
    psutil.Process(orphan).kill()
    while psutil.pid_exists(orphan):
        time.sleep(0.02)

    again = sweep(Path("s.yaml"), quiet=True)
    assert without_time(lines()) == without_time(lines("straight"))
    assert again.best.value == straight.best.value
    assert [starts(number) for number in (1, 2, 3, 4)] == [1, 1, 2, 1]
    assert not Path("out/running.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_in_order(number: signal.Signals) -> None:
    write(GRID)
    working = start_sweep(TRIAL_003="wait")
    wait_for(Path("out/trial-003.log"), "training")
    trial = json.loads(Path("out/running.json").read_text())[1][0]
    working.send_signal(number)
    _, said = working.communicate(timeout=30)
    assert working.returncode == 75
    assert said.decode() == "stopped; 2 of 4 trials are kept in out. The same command goes on\n"
    assert not psutil.pid_exists(trial)
    assert [line["trial"] for line in lines()] == [1, 2]
    assert not Path("out/running.json").exists()
    assert sweep(Path("s.yaml"), quiet=True).best.trial == 4


def test_a_trial_that_a_signal_ended_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a cluster takes the machine back: the trial has saved a checkpoint and ended with its status."""
    Path("train.py").write_text(
        TRAIN.replace(
            'if behaviour == "crash"', 'if behaviour == "saved":\n    sys.exit(75)\nif behaviour == "crash"'
        )
    )
    monkeypatch.setenv("TRIAL_002", "saved")
    with pytest.raises(RunInterrupted, match="1 of 4 trials are kept"):
        sweep(write(GRID), quiet=True)
    monkeypatch.delenv("TRIAL_002")
    assert sweep(Path("s.yaml"), quiet=True).best.trial == 4
    assert [starts(number) for number in (1, 2)] == [1, 2]


def test_a_finished_sweep_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    first = sweep(write(GRID), quiet=True)
    Path("out/trial-001/checkpoint-9").mkdir()  # as if it was killed before it had cleaned up
    again = sweep(Path("s.yaml"))
    assert again == first
    assert starts(1) == 1
    assert not Path("out/trial-001/checkpoint-9").exists()
    assert "best: trial-004" in capsys.readouterr().out
    shown = CliRunner().invoke(app, ["sweep", "--dry-run", "s.yaml"]).stdout
    assert "  trial-001  optim.lr=0.01 method.rank=4  (done)\n" in shown


def test_a_half_written_line_is_run_again() -> None:
    sweep(write(GRID), quiet=True)
    file = Path("out/trials.jsonl")
    whole = file.read_text()
    file.write_text(whole[:-20])
    sweep(Path("s.yaml"), quiet=True)
    assert without_time(lines())[3] == without_time([json.loads(line) for line in whole.splitlines()])[3]
    assert [starts(number) for number in (1, 4)] == [1, 2]


def test_a_removed_line_is_run_again() -> None:
    sweep(write(GRID), quiet=True)
    file = Path("out/trials.jsonl")
    file.write_text(
        "".join(line for line in file.read_text().splitlines(keepends=True) if '"trial": 2' not in line)
    )
    sweep(Path("s.yaml"), quiet=True)
    assert sorted(line["trial"] for line in lines()) == [1, 2, 3, 4]
    assert [starts(number) for number in (1, 2, 3, 4)] == [1, 2, 1, 1]


def test_more_trials_and_another_rule_of_keeping_are_no_other_sweep() -> None:
    sweep(write(OPTUNA.replace("trials: 12", "trials: 5")), quiet=True)
    sweep(write(OPTUNA + "keep: all\n"), quiet=True)
    assert len(lines()) == 12
    longer = without_time(lines())
    sweep(write(OPTUNA.replace("output: out", "output: straight")), quiet=True)
    assert without_time(lines("straight")) == longer


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("[4, 8]", "[4, 9]", "space"),
        ("recipe:", "metric: train_loss\nrecipe:", "metric"),
        (
            "output:",
            "overrides: [train.seed=3, optim.weight_decay=1]\noutput:",
            "optim.weight_decay, train.seed",
        ),
    ],
)
def test_a_changed_file_is_refused(old: str, new: str, changed: str) -> None:
    sweep(write(GRID), quiet=True)
    before = Path("out/trials.jsonl").read_bytes()
    with pytest.raises(CheckpointError) as caught:
        sweep(write(GRID.replace(old, new)), quiet=True)
    assert str(caught.value) == (
        f"output: out holds another sweep; changed since: {changed}. Name a new folder, or undo the change to go on"
    )
    assert Path("out/trials.jsonl").read_bytes() == before


def test_a_changed_recipe_is_refused_and_a_comment_is_no_change() -> None:
    sweep(write(GRID), quiet=True)
    base = Path("base.yaml").read_text()
    Path("base.yaml").write_text(f"# a comment\n{base}")
    sweep(Path("s.yaml"), quiet=True)
    Path("base.yaml").write_text(f"{base}optim: {{weight_decay: 0.5}}\nmethod: {{type: full}}\n")
    Path("s.yaml").write_text(GRID.replace("  method.rank: [4, 8]\n", ""))
    with pytest.raises(CheckpointError, match=r"changed since: space, method.type, optim.weight_decay\."):
        sweep(Path("s.yaml"), quiet=True)


def test_tokens_are_not_written_down() -> None:
    Path("base.yaml").write_text(
        "model: {path: embedded, token: hf_secret}\ndata: {train: [a], dev_split: 0.1}\n"
    )
    sweep(write(GRID), quiet=True)
    for file in Path("out").rglob("*"):
        assert file.is_dir() or "hf_secret" not in file.read_text(), file


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("out", None, "out is a file; name a folder in output"),
        (
            "out/thesis.tex",
            "",
            "output: out is no sweep but holds other files (thesis.tex); name a new folder",
        ),
        ("out/sweep.json", "{", "out/sweep.json is damaged: "),
    ],
)
def test_a_folder_that_is_something_else(name: str, content: str | None, message: str) -> None:
    if content is not None:
        Path("out").mkdir()
    Path(name).write_text(content or "")
    with pytest.raises(CheckpointError, match=re.escape(message)):
        sweep(write(GRID), quiet=True)
    assert Path(name).read_text() == (content or "")


@pytest.mark.parametrize("line", ["{]", "[1]", '{"trial": 2}'])
def test_a_damaged_record_is_named(line: str) -> None:
    sweep(write(GRID), quiet=True)
    with Path("out/trials.jsonl").open("a") as stream:
        stream.write(f"{line}\n")
    with pytest.raises(
        CheckpointError, match=r"^out/trials\.jsonl, line 5 is no trial: .*; remove the line$"
    ):
        sweep(Path("s.yaml"), quiet=True)


def test_a_record_that_the_search_would_not_propose_is_named() -> None:
    sweep(write(OPTUNA), quiet=True)
    file = Path("out/trials.jsonl")
    changed = lines()
    changed[1]["params"]["optim.lr"] = 0.5
    file.write_text("".join(json.dumps(line) + "\n" for line in changed))
    with pytest.raises(
        CheckpointError, match=r"^out/trials.jsonl: trial 2 was optim.lr=0.5 .* and would now be optim.lr="
    ):
        sweep(Path("s.yaml"), quiet=True)


# --------------------------------------------------------------------------------------------------
# optuna


def test_a_seed_gives_the_same_trials(folder: Path) -> None:
    for output, seed in (("a", 3), ("b", 3), ("c", 4)):
        sweep(
            write(OPTUNA.replace("seed: 3", f"seed: {seed}").replace("output: out", f"output: {output}")),
            quiet=True,
        )
    assert without_time(lines("a")) == without_time(lines("b"))
    assert [line["params"] for line in lines("a")] != [line["params"] for line in lines("c")]
    for line in lines("a"):
        rate, rank, shuffle = line["params"].values()
        assert 0.001 <= rate <= 1 and rank in range(2, 33) and shuffle in (True, False)


def test_the_estimator_learns_and_proposes_what_optuna_itself_does(folder: Path) -> None:
    """The same study asked and told directly, without a sweep around it."""
    import math

    import optuna

    sweep(write(OPTUNA), quiet=True)
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=3, n_startup_trials=4), direction="minimize"
    )
    kinds = optuna.distributions
    for line in lines():
        trial = study.ask(
            {
                "optim.lr": kinds.FloatDistribution(0.001, 1.0, log=True),
                "method.rank": kinds.IntDistribution(2, 32),
                "data.shuffle": kinds.CategoricalDistribution((0, 1)),
            }
        )
        assert line["params"]["optim.lr"] == pytest.approx(trial.params["optim.lr"], rel=1e-5)
        assert line["params"]["method.rank"] == trial.params["method.rank"]
        assert line["params"]["data.shuffle"] == [True, False][trial.params["data.shuffle"]]
        rate, rank = line["params"]["optim.lr"], line["params"]["method.rank"]
        assert line["value"] == 1 + abs(math.log10(rate) + 1) + abs(rank - 8) / 16
        study.tell(trial, line["value"])


def test_the_same_values_are_not_trained_twice() -> None:
    text = OPTUNA.replace("{low: 0.001, high: 1.0, log: true}", "[0.1, 0.2]").replace(
        "{low: 2, high: 32}", "[8]"
    )
    sweep(write(text), quiet=True)
    seen: dict[str, int] = {}
    for line in lines():
        name = json.dumps(line["params"])
        assert line["same_as"] == seen.get(name)
        assert starts(line["trial"]) == (0 if name in seen else 1)
        seen.setdefault(name, line["trial"])
    assert len(lines()) == 12 and len(seen) <= 4


def test_hopeless_trials_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule of the median pruner, computed here: the best so far against the others' median at that step."""
    import numpy as np

    monkeypatch.setenv("STEP", "0.05")
    sweep(write(PRUNED), quiet=True)
    done: list[dict[int, float]] = []
    statuses = []
    for line in lines():
        reports: dict[int, float] = dict(line["reports"])
        best = np.inf
        stopped = False
        for step, value in reports.items():
            assert not stopped, "it went on after the step that was hopeless"
            best = min(best, value)
            others = [min(v for s, v in other.items() if s <= step) for other in done]
            stopped = len(done) >= 2 and bool(best > np.median(others))
        assert (line["status"] == "pruned") is stopped, line
        statuses.append(line["status"])
        if stopped:
            assert line["value"] == list(reports.values())[-1]
            assert not Path(f"out/trial-{line['trial']:03d}/adapter_model.safetensors").exists()
        else:
            assert list(reports) == [1, 2, 3, 4]  # at the last step there is nothing to save
            done.append(reports)
    assert statuses[:2] == ["done", "done"] and statuses.count("pruned") >= 2
    again = without_time(lines())
    sweep(Path("s.yaml"), quiet=True)
    sweep(write(PRUNED.replace("output: out", "output: straight")), quiet=True)
    assert without_time(lines()) == again == without_time(lines("straight"))


def test_the_name_of_the_log_is_the_runs_own() -> None:
    assert process.LOG_NAME == LOG_NAME


def test_errors_are_of_the_kind_that_the_command_shows() -> None:
    assert issubclass(RunInterrupted, LuthierError)
