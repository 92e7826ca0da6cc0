"""Sweeps of real runs on a tiny model, through the command line."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import luthier
from luthier.cli import app
from luthier.sweep.run import sweep
from tests.tiny import chat_model, write_alpaca

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # for the trials' own processes
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    chat_model(tmp_path / "model")
    write_alpaca(tmp_path / "rows.json", 24)
    write_alpaca(tmp_path / "other.json", 6)
    recipe = {
        "model": {"path": "model"},
        "data": {"train": ["rows.json"], "eval": ["other.json"], "directory": ".", "cache": "cache"},
        "optim": {"type": "adamw", "lr": 0.01},
        "train": {"rows_per_device": 4, "epochs": 1, "log_every": 1, "plots": False},
    }
    Path("recipe.json").write_text(json.dumps(recipe))
    return tmp_path


def write(**keys: Any) -> Path:
    Path("s.json").write_text(json.dumps({"recipe": "recipe.json", "output": "out", **keys}))
    return Path("s.json")


def results(run: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((run / "all_results.json").read_text())
    return loaded


@pytest.mark.slow
def test_a_grid_finds_the_best_and_its_recipe_gives_the_same_again(folder: Path) -> None:
    write(space={"optim.lr": [0.0001, 0.03], "method.rank": [2, 8]})
    done = CliRunner().invoke(app, ["sweep", "--quiet", "s.json"])
    assert (done.exit_code, done.stdout) == (0, ""), done.stderr
    trials = [json.loads(line) for line in Path("out/trials.jsonl").read_text().splitlines()]
    values = [results(Path(f"out/trial-00{number}"))["eval_loss"] for number in (1, 2, 3, 4)]
    assert [trial["value"] for trial in trials] == values
    assert len(set(values)) == 4
    best = values.index(min(values)) + 1
    assert trials[best - 1]["params"]["optim.lr"] == 0.03
    weights = [path.parent.name for path in sorted(Path("out").glob("*/adapter_model.safetensors"))]
    assert weights == [f"trial-{best:03d}"]
    assert [path.parent.name for path in Path("out").glob("*/checkpoint-*")] == [f"trial-{best:03d}"]
    # one entry for each data set, whatever the number of trials
    assert len([path for path in Path("cache").iterdir() if not path.name.startswith(".")]) == 2

    again = luthier.train("out/best.yaml", quiet=True)
    assert again.output == Path("out/best")
    assert again.metrics["eval_loss"] == min(values)
    words = [f"{key}={value}" for key, value in trials[0]["params"].items()]
    alone = luthier.train("recipe.json", [*words, "train.output=alone"], quiet=True)
    assert alone.metrics["eval_loss"] == values[0]


@pytest.mark.slow
def test_a_trial_that_cannot_train_is_left_out(folder: Path) -> None:
    result = sweep(write(space={"method.targets": [["no_such_module"], "all-linear"]}), quiet=True)
    failed, done = result.trials
    assert (failed.status, done.status, result.best.trial) == ("failed", "done", 2)
    assert failed.error is not None and "no_such_module" in failed.error
    assert failed.error in Path("out/trial-001.log").read_text()


@pytest.mark.slow
def test_the_estimator_stops_a_trial_that_does_not_learn(folder: Path) -> None:
    result = sweep(
        write(
            search={"type": "optuna", "trials": 3, "seed": 5, "pruner": "median", "prune_after_trials": 1},
            space={"optim.lr": {"low": 1e-7, "high": 0.05, "log": True}},
            overrides=["train.eval_every=1", "train.max_steps=12", "optim.schedule=constant"],
        ),
        quiet=True,
    )
    first = result.trials[0]
    assert first.status == "done" and [step for step, _ in first.reports] == list(range(1, 12))
    for trial in result.trials[1:]:
        others = [other for other in result.trials[: trial.trial - 1] if other.status == "done"]
        hopeless = False
        for step, _ in trial.reports:
            best = min(value for at, value in trial.reports if at <= step)
            medians = sorted(min(v for at, v in other.reports if at <= step) for other in others)
            middle = (medians[(len(medians) - 1) // 2] + medians[len(medians) // 2]) / 2
            assert not hopeless
            hopeless = best > middle
        assert (trial.status == "pruned") is hopeless
    assert {trial.status for trial in result.trials} == {"done", "pruned"}


@pytest.mark.slow
def test_the_example_runs_on_the_embedded_model(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is, but for two of its six trials, of one step each."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    tree = yaml.safe_load((ROOT / "examples/sweep/learning_rate.yaml").read_text())
    tree["space"] = {"optim.lr": [1e-3], "method.rank": [8, 32]}
    tree["recipe"] = str(ROOT / "examples/sft_lora.yaml")
    tree["output"] = str(tmp_path / "out")
    tree["overrides"] = [
        f"model.path={smollm2}", f"data.cache={tmp_path / 'cache'}", "data.max_samples=20", "train.max_steps=1",
        "train.plots=false", "train.save_every=null", "train.eval_every=null",
    ]  # fmt: skip
    (tmp_path / "s.json").write_text(json.dumps(tree))
    result = sweep(tmp_path / "s.json", quiet=True)
    assert [trial.status for trial in result.trials] == ["done", "done"]
    assert all(0.5 < (trial.value or 0) < 6 for trial in result.trials)
