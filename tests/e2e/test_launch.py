"""`luthier train` with several processes of one machine: the same run, and what becomes of it when one of them fails.

The launcher is this process; its workers are processes of their own, as for any user.
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
import torch

import luthier
from luthier.launch import verb
from luthier.trainer.log import read_log
from luthier.types import CheckpointError, DataError, LuthierError, ProcessFailed, RecipeError, RunInterrupted
from tests.launching import assert_equal_weights, assert_intact, launch_recipe, weights, workers_of

TWO = ["parallel.processes=2"]
ENDED_WITHIN = 90.0
"""Seconds until a failure has ended the run, most of which a busy machine needs to start workers."""


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("FAULT", "none:0:0")
    monkeypatch.setenv("FAULT_DONE", str(tmp_path / "done"))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes from the beginning to the end."""
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("FAULT_DONE", str(folder / "done"))
        return luthier.train(launch_recipe(folder), TWO, quiet=True).output


def test_two_processes_are_one(straight: Path, tmp_path: Path) -> None:
    recipe = launch_recipe(tmp_path, rows_per_device=4)
    one = luthier.train(recipe, quiet=True)
    # Two processes with two rows each take the same four in a step as one process.
    assert_close(straight, one.output)
    losses = [
        [line["loss"] for line in read_log(run / "trainer_log.jsonl") if "loss" in line]
        for run in (straight, one.output)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 5
    assert json.loads((straight / "run.json").read_text())["parallel"]["processes"] == 2
    assert not list(straight.glob(".*"))


def assert_close(run: Path, other: Path) -> None:
    expected, found = weights(other), weights(run)
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    for name, tensor in found.items():
        assert torch.allclose(tensor, expected[name], atol=1e-5 * largest, rtol=0), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "expected", "text"),
    [
        ("luthier", DataError, "process 1: row 7 is of another world"),
        ("bug", ProcessFailed, "ZeroDivisionError: made on purpose"),
        ("kill", ProcessFailed, "process 1 was killed by SIGKILL"),
        ("hang", ProcessFailed, "in_a_deep_well"),
    ],
)
def test_a_process_that_fails_ends_the_run(
    kind: str,
    expected: type[LuthierError],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FAULT", f"{kind}:1:3")
    recipe, begun = launch_recipe(tmp_path), time.monotonic()
    with pytest.raises(expected) as caught:
        luthier.train(recipe, [*TWO, "parallel.timeout=10"], quiet=True)
    assert time.monotonic() - begun < ENDED_WITHIN
    assert text in str(caught.value)
    if kind == "hang":
        assert "waited 10 s (parallel.timeout) in vain for process 1" in str(caught.value)
    if expected is ProcessFailed:
        assert str(caught.value).endswith("is whole; go on from it with train.resume=auto")
    assert "elastic" not in capfd.readouterr().err
    assert_intact(tmp_path / "run", at_least=2)
    assert workers_of(str(tmp_path)) == []
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_a_killed_process_is_started_again(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAULT", "kill:1:3")
    recipe = launch_recipe(tmp_path)
    luthier.train(recipe, [*TWO, "parallel.max_restarts=1", "train.overwrite=true"])
    assert (tmp_path / "done").exists()
    assert_equal_weights(tmp_path / "run", straight)
    shown = capfd.readouterr().out
    assert "process 1 was killed by SIGKILL" in shown
    assert "starting again, 1 of 1 times" in shown
    assert "resuming from" in shown
    steps = [
        line["current_steps"] for line in read_log(tmp_path / "run" / "trainer_log.jsonl") if "loss" in line
    ]
    assert steps == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_a_signal_to_the_launcher_saves_and_goes_on(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT", "stop:1:2")
    recipe, before = launch_recipe(tmp_path), signal.getsignal(signal.SIGTERM)
    with pytest.raises(
        RunInterrupted, match=r"SIGTERM: stopped after step [23] of 5; checkpoint-[23] is whole"
    ):
        luthier.train(recipe, [*TWO, "parallel.max_restarts=3"], quiet=True)
    assert signal.getsignal(signal.SIGTERM) == before
    assert_intact(tmp_path / "run", at_least=2)
    assert workers_of(str(tmp_path)) == []
    luthier.train(recipe, [*TWO, "train.resume=auto"], quiet=True)
    assert_equal_weights(tmp_path / "run", straight)


def test_what_can_fail_early_fails_before_any_process_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*arguments: object) -> None:
        raise AssertionError("workers were started")

    monkeypatch.setattr(verb, "run_workers", started)
    recipe = launch_recipe(tmp_path)
    (tmp_path / "rows.json").write_text('[{"instruction": "a"')
    with pytest.raises(DataError, match=r"rows\.json"):
        luthier.train(recipe, TWO, quiet=True)
    assert not (tmp_path / "run").exists()
    launch_recipe(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "trainer_log.jsonl").write_text("")
    with pytest.raises(CheckpointError, match="holds a run already"):
        luthier.train(recipe, TWO, quiet=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["trainer_log.jsonl"]
    with pytest.raises(RecipeError, match="2 machines need to know where they meet"):
        luthier.train(recipe, ["parallel.nodes=2"], quiet=True)
    with pytest.raises(AssertionError, match="workers were started"):  # the probe sees a start
        luthier.train(recipe, [*TWO, "train.overwrite=true"], quiet=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["trainer_log.jsonl"]
