"""kill -9 while a checkpoint is being written: the one before stays valid, is used, and the end is the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import luthier
from luthier.trainer.checkpoint import newest_valid, verify
from tests.tiny import chat_model, write_alpaca

KILLED_WHILE_WRITING = """
import os, signal, sys
import luthier
from luthier.trainer import checkpoint

write, calls = checkpoint._write_manifest, []

def dies_at_third(folder, metadata):
    calls.append(folder)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    write(folder, metadata)

checkpoint._write_manifest = dies_at_third
luthier.train(sys.argv[1], quiet=True)
"""


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
            "save_every": 1,
            "log_every": 1,
            "plots": False,
            "output": str(tmp_path / "run"),
        },
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(tree))
    return file


def test_killed_while_writing_a_checkpoint(recipe: Path, tmp_path: Path) -> None:
    straight = luthier.train(recipe, [f"train.output={tmp_path / 'straight'}"], quiet=True).output
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, str(recipe)], env=environment)
    assert killed.returncode == -signal.SIGKILL
    run = tmp_path / "run"
    left = sorted(path.name for path in run.iterdir() if "checkpoint" in path.name)
    assert left[-2:] == ["checkpoint-1", "checkpoint-2"], left
    assert len(left) == 3 and left[0].startswith(".tmp-checkpoint-3")  # what the dead process left
    newest, skipped = newest_valid(run, resumable=True)
    assert (newest, skipped) == (run / "checkpoint-2", [])

    luthier.train(recipe, ["train.resume=auto"], quiet=True)
    assert not [path for path in run.iterdir() if path.name.startswith(".")]
    expected = load_file(straight / "adapter_model.safetensors")
    for name, tensor in load_file(run / "adapter_model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name
    for checkpoint in run.glob("checkpoint-*"):
        verify(checkpoint)


def test_damaged_checkpoint_is_skipped_and_said(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = luthier.train(recipe, quiet=True).output
    last = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    weights = last / "adapter_model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(bytes(damaged))
    luthier.train(recipe, ["train.resume=auto"])
    shown = capsys.readouterr().out
    assert f"checkpoint {last.name} is not used" in shown
    assert "adapter_model.safetensors" in shown
    assert "resuming from" in shown and "checkpoint-5" in shown
