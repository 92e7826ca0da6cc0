"""A run is not lost to a signal, a full disk or a second thought: what was saved is whole, and goes on."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import luthier
from luthier.trainer import saving
from luthier.trainer.callbacks import LogCallback
from luthier.trainer.checkpoint import newest_valid, verify
from luthier.types import CheckpointError, RunInterrupted
from tests.tiny import chat_model, write_alpaca


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    chat_model(tmp_path / "model")
    write_alpaca(tmp_path / "rows.json", 24)
    tree = {
        "model": {"path": str(tmp_path / "model")},
        "data": {"train": ["rows.json"], "directory": str(tmp_path), "cache": str(tmp_path / "cache")},
        "method": {"type": "lora", "rank": 4, "dropout": 0.1},
        "optim": {"type": "adamw", "lr": 0.01},
        "train": {
            "rows_per_device": 4,
            "epochs": 1,
            "save_every": 2,
            "log_every": 1,
            "plots": False,
            "output": str(tmp_path / "run"),
        },
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(tree))
    return file


def assert_same_end(run: Path, straight: Path) -> None:
    expected = load_file(straight / "adapter_model.safetensors")
    for name, tensor in load_file(run / "adapter_model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


SIGNALLED = """
import os, signal, sys
from luthier.cli import app
from luthier.trainer.callbacks import LogCallback

number = getattr(signal, sys.argv[1])
step_end = LogCallback.on_step_end
def signals(self, args, state, control, **kwargs):
    step_end(self, args, state, control, **kwargs)
    if state.global_step == 3:
        os.kill(os.getpid(), number)
LogCallback.on_step_end = signals
sys.argv[1:] = ["train", *sys.argv[2:]]
app()
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_says_how_to_go_on(name: str, recipe: Path, tmp_path: Path) -> None:
    straight = luthier.train(recipe, [f"train.output={tmp_path / 'straight'}"], quiet=True).output
    stopped = subprocess.run(
        [sys.executable, "-c", SIGNALLED, name, str(recipe), "-q"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert stopped.returncode == 75, stopped.stderr
    assert stopped.stderr.splitlines()[-1] == (
        f"{name}: stopped after step 3 of 6; checkpoint-3 is whole; go on from it with train.resume=auto"
    )
    run = tmp_path / "run"
    verify(run / "checkpoint-3")
    assert not (run / "run.json").exists() and not (run / "adapter_model.safetensors").exists()
    luthier.train(recipe, ["train.resume=auto"], quiet=True)
    assert_same_end(run, straight)


def test_a_changed_run_is_refused_and_may_be_allowed(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = luthier.train(recipe, ["train.max_steps=4"], quiet=True).output
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError) as caught:
        luthier.train(recipe, ["train.max_steps=4", "train.resume=auto", "optim.lr=0.5"], quiet=True)
    assert str(caught.value) == (
        f"{run / 'checkpoint-4'} is of a run that was another: optim.lr was 0.01 and is 0.5. To go on all the "
        "same, give train.allow_changes=true; to start anew, another train.output"
    )
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    write_alpaca(tmp_path / "rows.json", 23)
    with pytest.raises(CheckpointError, match="max_steps was 4 and is None; the training data"):
        luthier.train(recipe, ["train.resume=auto"], quiet=True)
    capsys.readouterr()
    luthier.train(recipe, ["train.resume=auto", "train.allow_changes=true"])
    shown = capsys.readouterr().out
    assert "changed since checkpoint-4: train.max_steps was 4 and is None" in shown
    assert "changed since checkpoint-4: the training data" in shown


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_disk_that_fills_up_while_writing_loses_nothing(
    asynchronous: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = luthier.train(recipe, [f"train.output={tmp_path / 'straight'}"], quiet=True).output
    right = saving.TrainingState.write

    def full(self: saving.TrainingState, folder: Path) -> None:
        if "checkpoint-4" in folder.name:
            (folder / "optimizer.pt").write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        right(self, folder)

    with monkeypatch.context() as patch, pytest.raises(CheckpointError) as caught:
        patch.setattr(saving.TrainingState, "write", full)
        luthier.train(recipe, [f"train.async_save={asynchronous}"], quiet=True)
    assert str(caught.value) == (
        "checkpoint-4 could not be written: No space left on device. checkpoint-2 is whole; "
        "make room and go on from it with train.resume=auto"
    )
    run = tmp_path / "run"
    assert sorted(path.name for path in run.glob("*checkpoint*")) == ["checkpoint-2"]
    luthier.train(recipe, ["train.resume=auto", f"train.async_save={asynchronous}"], quiet=True)
    assert_same_end(run, straight)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB, where one can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], capture_output=True
        ).returncode
    ):
        pytest.skip("no tmpfs can be mounted here; the full disk is injected in the test above")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_real_full_disk(recipe: Path, small_disk: Path, tmp_path: Path) -> None:
    output = small_disk / "run"
    words = [f"train.output={output}", "train.save_total_limit=2"]
    straight = luthier.train(recipe, [f"train.output={tmp_path / 'straight'}"], quiet=True).output
    luthier.train(recipe, [*words, "train.max_steps=2"], quiet=True)
    (small_disk / "others").write_bytes(b"x" * 14 * 2**20)
    with pytest.raises(CheckpointError, match=r"no room for checkpoint-4.*checkpoint-2 is whole"):
        luthier.train(recipe, [*words, "train.resume=auto", "train.allow_changes=true"], quiet=True)
    assert newest_valid(output, resumable=True)[0] == output / "checkpoint-2"
    (small_disk / "others").unlink()
    luthier.train(recipe, [*words, "train.resume=auto", "train.allow_changes=true"], quiet=True)
    assert {path.name for path in straight.glob("*.safetensors")} <= {path.name for path in output.iterdir()}


def test_background_and_foreground_write_the_same_bytes(recipe: Path, tmp_path: Path) -> None:
    def files(run: Path) -> dict[str, str]:
        found: dict[str, str] = {}
        for checkpoint in run.glob("checkpoint-*"):
            manifest: dict[str, Any] = json.loads((checkpoint / "manifest.json").read_text())
            found |= {f"{checkpoint.name}/{one['path']}": one["sha256"] for one in manifest["files"]}
        return {name: value for name, value in found.items() if not name.endswith("trainer_state.json")}

    runs = [
        luthier.train(
            recipe, [f"train.async_save={mode}", f"train.output={tmp_path / mode}"], quiet=True
        ).output
        for mode in ("true", "false")
    ]
    first, second = map(files, runs)
    assert len(first) > 10
    assert first == second


def test_a_run_resumed_at_its_end_trains_no_further(recipe: Path, tmp_path: Path) -> None:
    """`max_steps` inside an epoch, and the process died between the last checkpoint and the final save."""
    words = ["train.max_steps=4", "optim.schedule=constant"]
    straight = luthier.train(recipe, [*words, f"train.output={tmp_path / 'straight'}"], quiet=True)
    run = luthier.train(recipe, words, quiet=True).output
    (run / "adapter_model.safetensors").unlink()
    again = luthier.train(recipe, [*words, "train.resume=auto"], quiet=True)
    assert_same_end(run, straight.output)
    assert again.metrics["train_loss"] == straight.metrics["train_loss"]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGES = {
    "changed": _flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "removed": lambda path: path.unlink(),
}


def test_every_damage_of_every_file_is_found_and_the_previous_checkpoint_used(
    recipe: Path, tmp_path: Path
) -> None:
    run = luthier.train(recipe, ["train.max_steps=4"], quiet=True).output
    files = sorted(path.name for path in (run / "checkpoint-4").iterdir())
    assert {"adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "loop_state.json"} <= set(files)
    for name in files:
        path = run / "checkpoint-4" / name
        whole = path.read_bytes()
        for damage in DAMAGES.values():
            damage(path)
            newest, skipped = newest_valid(run, resumable=True)
            assert newest == run / "checkpoint-2", name
            ((folder, reason),) = skipped
            assert folder == run / "checkpoint-4" and (name in reason or name == "manifest.json"), reason
            path.write_bytes(whole)
    assert newest_valid(run, resumable=True) == (run / "checkpoint-4", [])


def test_the_log_reads_the_same_after_any_number_of_resumes(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped by a signal after steps 1, 2 and 5 of 6; lines, mean loss and tokens are those of one run."""

    def told(run: Path) -> list[dict[str, Any]]:
        keys = ("current_steps", "total_steps", "loss", "learning_rate", "grad_norm", "epoch", "tokens")
        lines = [json.loads(line) for line in (run / "trainer_log.jsonl").read_text().splitlines()]
        return [{key: line[key] for key in keys if key in line} for line in lines if "loss" in line]

    straight = luthier.train(
        recipe, ["train.log_every=2", f"train.output={tmp_path / 'straight'}"], quiet=True
    )
    step_end = LogCallback.on_step_end
    stops = [1, 2, 5]

    def signals(self: LogCallback, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step_end(self, args, state, control, **kwargs)
        if stops and state.global_step == stops[0]:
            stops.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(LogCallback, "on_step_end", signals)
    for step in (1, 2, 5):
        with pytest.raises(
            RunInterrupted, match=f"stopped after step {step} of 6; checkpoint-{step} is whole"
        ):
            luthier.train(recipe, ["train.log_every=2", "train.resume=auto"], quiet=True)
    ended = luthier.train(recipe, ["train.log_every=2", "train.resume=auto"], quiet=True)
    assert told(ended.output) == told(straight.output)
    assert ended.metrics["train_loss"] == straight.metrics["train_loss"]
    assert ended.metrics["train_tokens"] == straight.metrics["train_tokens"]
    assert_same_end(ended.output, straight.output)
