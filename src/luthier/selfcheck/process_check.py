"""The claim that several processes are one: the same step of the user's model in two processes and in one."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from luthier.recipe.schema import DdpSpec, OnlineSpec
from luthier.selfcheck.bench import Bench, relative_difference
from luthier.selfcheck.outcome import Outcome, left_out
from luthier.selfcheck.process_worker import RECIPE_NAME, gradients_name, said_name
from luthier.selfcheck.step_checks import trainer_of

COUNT = 2
LIMIT = 900.0
"""Seconds after which processes that have said nothing are ended."""
COPIES = 3
"""A process holds the model, its gradients and DistributedDataParallel's buckets of them."""
WORKER = ("-m", "luthier.selfcheck.process_worker")

CLAIM = f"{COUNT} processes = 1"


def processes(bench: Bench) -> Outcome:
    """Loss and gradients of a step do not depend on how many processes share it out: both processes' are compared with
    those of this one, which holds all rows in one pass."""
    if reason := _impossible(bench):
        return left_out("processes", CLAIM, reason)
    folder = bench.folder / "processes"
    folder.mkdir()
    (folder / RECIPE_NAME).write_bytes(pickle.dumps(bench.loaded))
    trainer = trainer_of(bench)
    loss = float(trainer.training_step(bench.model, [bench.stage.collate(bench.samples)]))
    expected = bench.gradients()
    bench.model.eval()
    failure = _run(folder)
    if failure:
        return Outcome("processes", CLAIM, float("inf"), bench.gradient_bound, "", failure)
    losses = [json.loads((folder / said_name(rank)).read_text())["loss"] for rank in range(COUNT)]
    apart = [abs(found - loss) / max(abs(loss), 1e-12) for found in losses]
    apart += [
        relative_difference(load_file(folder / gradients_name(rank)), expected) for rank in range(COUNT)
    ]
    detail = f"{len(bench.samples)} rows; losses {losses[0]:.8g} and {loss:.8g}"
    return Outcome("processes", CLAIM, max(apart), bench.gradient_bound, "of its norm", detail)


def _impossible(bench: Bench) -> str:
    """Why two processes cannot be tried here; "" where they can."""
    if "RANK" in os.environ:
        return "this is one of several processes itself"
    if isinstance(bench.settings.stage, OnlineSpec):
        return "a step of this stage learns from a rollout and its rewards, which these rows are not"
    if not isinstance(bench.settings.parallel, DdpSpec):
        return f"measured for parallel: ddp, and this is {bench.settings.parallel.type}"
    if bench.hardware.device == "mps":
        return "processes do not speak with each other from this device"
    if bench.hardware.device == "cuda":
        found = torch.cuda.device_count()
        return "" if found >= COUNT else f"needs {COUNT} GPUs, and there is {found}"
    size = sum(one.numel() * one.element_size() for one in bench.model.parameters())
    needed, free = COUNT * COPIES * size, psutil.virtual_memory().available
    if needed > free:
        return f"needs {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} are free"
    return ""


def _run(folder: Path) -> str:
    """Start the processes and wait for them; what went wrong, or ""."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join(filter(None, sys.path))
    common = {"PYTHONPATH": path, "WORLD_SIZE": str(COUNT), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // COUNT))}
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context((folder / f"output-{rank}").open("wb")) for rank in range(COUNT)]
        # Of their own, not copies of this one: a script that has no main guard is not run again.
        started = [
            subprocess.Popen(
                [sys.executable, *WORKER, str(folder)],
                env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=outputs[rank],
                stderr=subprocess.STDOUT,
            )
            for rank in range(COUNT)
        ]
        try:
            return _waited(folder, started)
        finally:
            for process in started:
                process.kill()
                process.wait()


def _waited(folder: Path, started: Sequence[subprocess.Popen[bytes]]) -> str:
    end = time.monotonic() + LIMIT
    while True:
        states = [process.poll() for process in started]
        for rank, state in enumerate(states):
            if state not in (None, 0):  # the other one waits for it in vain
                return f"process {rank} failed: {_said(folder, rank)}"
        if all(state == 0 for state in states):
            return ""
        if time.monotonic() > end:
            return f"after {LIMIT:.0f} s the processes had said nothing"
        time.sleep(0.1)


def _said(folder: Path, rank: int) -> str:
    """Why a process failed, in a few words."""
    file = folder / said_name(rank)
    if file.is_file():
        return str(json.loads(file.read_text(encoding="utf-8"))["error"])
    lines = (folder / f"output-{rank}").read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[-1] if lines else "it said nothing"
