"""Runs of several processes as a user starts them, and faults that reach one of their processes.

A fault is a callback of the recipe: it stands beside the run in a file of its own and is told by the environment.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from luthier.trainer.checkpoint import is_temporary, newest_valid
from tests.tiny import chat_model, write_alpaca

FAULTS = '''
import os, signal, time
from pathlib import Path
from transformers import TrainerCallback
from luthier.types import DataError

class Fault(TrainerCallback):
    """FAULT=kind:rank:step, once for each file FAULT_DONE that is not there yet."""

    def on_step_end(self, args, state, control, **kwargs):
        kind, rank, step = os.environ.get("FAULT", "none:0:0").split(":")
        if int(rank) != args.process_index or int(step) != state.global_step or kind == "none":
            return
        done = Path(os.environ["FAULT_DONE"])
        if done.exists():
            return
        done.write_text(str(os.getpid()))
        if kind == "luthier":
            raise DataError("row 7 is of another world")
        if kind == "bug":
            raise ZeroDivisionError("made on purpose")
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "kill-node":
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "hang":
            in_a_deep_well()
        if kind == "stop":
            os.kill(os.getppid(), signal.SIGTERM)

def in_a_deep_well():
    while True:
        time.sleep(1)
'''


def launch_recipe(folder: Path, **train: Any) -> Path:
    """A recipe of five steps on a tiny model, with a checkpoint after each, in `folder`."""
    chat_model(folder / "model")
    write_alpaca(folder / "rows.json", 20)
    (folder / "faults.py").write_text(FAULTS, encoding="utf-8")
    tree = {
        "model": {"path": str(folder / "model")},
        "data": {"train": ["rows.json"], "directory": str(folder), "cache": str(folder / "cache")},
        "method": {"type": "lora", "rank": 4, "dropout": 0.0},
        "optim": {"type": "adamw", "lr": 0.01},
        "train": {
            "rows_per_device": 2,
            "max_steps": 5,
            "save_every": 1,
            "log_every": 1,
            "plots": False,
            "callbacks": ["faults.py:Fault"],
            "output": str(folder / "run"),
            **train,
        },
    }
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(tree), encoding="utf-8")
    return file


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter_model.safetensors")


def assert_equal_weights(run: Path, other: Path) -> None:
    expected = weights(other)
    for name, tensor in weights(run).items():
        assert torch.equal(tensor, expected[name]), name


def assert_intact(run: Path, at_least: int) -> None:
    """The newest checkpoint verifies and is not too old, and nothing is half-written."""
    newest, skipped = newest_valid(run, resumable=True)
    assert newest is not None and not skipped
    assert int(newest.name.removeprefix("checkpoint-")) >= at_least
    assert not [path.name for path in run.iterdir() if is_temporary(path.name)]


def workers_of(word: str) -> list[int]:
    """Worker processes that live, whose command line or environment names `word`."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if "luthier.launch.worker" in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            try:
                if word in process.environ().get("FAULT_DONE", ""):
                    found.append(process.pid)
            except psutil.Error:
                continue
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(words: Sequence[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """A command of its own, whose words go to `log`; one thread, as tests that compare bits need."""
    own = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    outer = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    with log.open("ab") as stream:
        return subprocess.Popen(
            list(words),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**outer, **own, **environment},
            start_new_session=True,
        )


def luthier_words(*words: str) -> list[str]:
    return [sys.executable, "-m", "luthier.cli", *words]


def until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)
