"""A stream that several real processes train on is the stream of one: the same rows, each once in an epoch, the same
losses; and a checkpoint of two processes goes on in one and in three.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

import luthier
from luthier.trainer.checkpoint import verify
from tests import processes
from tests.tiny import chat_model

pytestmark = pytest.mark.slow

SIZES = {"a": 41, "b": 22}
EVERY = Counter({(name, i): 1 for name, size in SIZES.items() for i in range(size)})
STEPS = 12


def noting(folder: str, rank: int) -> AbstractContextManager[Any]:
    """Each process writes down the epoch, set and row of all samples of its steps."""
    from luthier.trainer.stream_steps import StreamSteps

    passes = StreamSteps._passes
    file = Path(folder, f"seen-{rank}-{os.getpid()}.jsonl")

    def noted(self: StreamSteps, micro_batches: Any) -> Any:
        collate = self._collate

        def own(samples: Any) -> Any:
            with file.open("a") as lines:
                for sample in samples:
                    if sample.source:  # not what a process without work is given
                        lines.write(json.dumps([self._next, self.epoch, sample.source, sample.index]) + "\n")
            return collate(samples)

        self._collate = own
        try:
            return passes(self, micro_batches)
        finally:
            self._collate = collate

    return patch.object(StreamSteps, "_passes", noted)


def recipe(
    folder: Path, output: str, *, packed: bool, rows: int = 0, workers: int = 1, **train: Any
) -> dict[str, Any]:
    batch = {"rows_per_device": rows} if packed else {"tokens_per_batch": 300}
    return {
        "model": {"path": str(folder / "model")},
        "data": {
            "train": [f"{name}.jsonl" for name in SIZES],
            "directory": str(folder),
            "cache": str(folder / "cache"),
            "max_length": 128,
            "stream": {"buffer": 9},
            "mix": {"strategy": "interleave", "until": "once"},
            "packing": packed,
            "workers": workers,
        },
        "method": {"type": "full"},
        # no Adam: where a weight rests on rounding alone, it would make a whole step of it
        "optim": {"type": "sgd", "lr": 0.05, "schedule": "constant"},
        "train": {
            **batch,
            "max_steps": STEPS,
            "save_every": 4,
            "log_every": 1,
            "plots": False,
            "output": str(folder / output),
            **train,
        },
    }


@dataclass
class Runs:
    folder: Path

    def losses(self, name: str) -> list[float]:
        lines = map(json.loads, (self.folder / name / "trainer_log.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if "loss" in line]

    def seen(self, name: str) -> list[tuple[int, int, str, int]]:
        """Step, epoch, set and row of what all processes had."""
        files = sorted((self.folder / f"notes-{name}").glob("seen-*.jsonl"))
        return [tuple(json.loads(line)) for file in files for line in file.read_text().splitlines()]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / name / "model.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Each kind in one process and in two, and the checkpoint of two processes on in one and in three."""
    folder = tmp_path_factory.mktemp("processes")
    chat_model(folder / "model")
    for name, size in SIZES.items():
        rows = [{"instruction": f"{name} {i}?", "output": name * (1 + i % 7)} for i in range(size)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def trained(count: int, *named: tuple[str, dict[str, Any]]) -> None:
        """In `count` processes; one is this process."""
        asked: list[tuple[dict[str, Any], Callable[[int], AbstractContextManager[Any]]]] = []
        for name, one in named:
            (folder / f"notes-{name}").mkdir()
            asked.append((one, partial(noting, str(folder / f"notes-{name}"))))
        if count == 1:
            for one, change in asked:
                with change(0):
                    luthier.train(one, quiet=True)
            return
        said = processes.train_in_processes(asked, folder / f"said-{named[0][0]}", count)
        assert said == [[""] * len(named)] * count

    one = recipe(folder, "packed-1", packed=True, rows=2)
    two = recipe(folder, "packed-2", packed=True, rows=1, workers=2)
    single, pair = (recipe(folder, f"tokens-{n}", packed=False) for n in (1, 2))
    trained(1, ("packed-1", one), ("tokens-1", single))
    trained(2, ("packed-2", two), ("tokens-2", pair))
    for count in (1, 3):
        name = f"resumed-{count}"
        source = folder / "tokens-2" / "checkpoint-4"
        (folder / name).mkdir()
        for file in ("recipe.yaml", "trainer_log.jsonl"):
            shutil.copy(source.parent / file, folder / name / file)
        shutil.copytree(source, folder / name / source.name)
        trained(count, (name, recipe(folder, name, packed=False, resume="auto")))
    return Runs(folder)


@pytest.mark.parametrize("kind", ["packed", "tokens"])
def test_two_processes_are_one(runs: Runs, kind: str) -> None:
    one, two = (runs.losses(f"{kind}-{count}") for count in (1, 2))
    assert len(one) == STEPS and two == pytest.approx(one, rel=1e-5)
    weights = [runs.weights(f"{kind}-{count}") for count in (1, 2)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-6)
    # the same samples in the same steps, whoever has them
    assert sorted(runs.seen(f"{kind}-1")) == sorted(runs.seen(f"{kind}-2"))


@pytest.mark.parametrize("name", ["packed-1", "packed-2", "tokens-1", "tokens-2"])
def test_every_row_comes_once_in_an_epoch(runs: Runs, name: str) -> None:
    seen = runs.seen(name)
    last = max(epoch for _, epoch, _, _ in seen)
    assert last >= 1
    for epoch in range(last):
        assert Counter((source, row) for _, at, source, row in seen if at == epoch) == EVERY


@pytest.mark.parametrize("count", [1, 3])
def test_a_checkpoint_of_two_goes_on_in_another_number(runs: Runs, count: int) -> None:
    name = f"resumed-{count}"
    assert runs.losses(name) == pytest.approx(runs.losses("tokens-2"), rel=1e-5)
    expected = sorted(one for one in runs.seen("tokens-2") if one[0] > 4)
    assert sorted(runs.seen(name)) == expected and expected
    verify(runs.folder / name / "checkpoint-12")
