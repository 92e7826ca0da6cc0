"""Runs under DeepSpeed in several processes, each beside the same run of one plain process.

All runs in processes are made together, in one set of them: starting one takes longer than all that it trains.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

import luthier
from tests import processes
from tests.compared import FULL, recipe_for
from tests.tiny import chat_model, write_alpaca

Recipe = dict[str, Any]

ALL_DIVIDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""A tiny model's parameters are all so small that ZeRO-3 would keep them whole otherwise."""
OPTIM = {"type": "adamw", "lr": 0.01, "eps": 1e-4, "weight_decay": 0.1, "max_grad_norm": 0.1}


def recipe(folder: Path, stage: str, method: Mapping[str, Any] = FULL, **train: Any) -> Recipe:
    """Four steps of eight rows (the last of seven, so that one of two processes has a pass less), evaluated and kept
    after the second and the last."""
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / "model"
    if not base.exists():
        chat_model(base)
    steps = {"eval_every": 2, "save_every": 2, "plots": False, "tokens_per_pass": 40, **train}
    name = "rm" if stage == "rm" else "dpo"
    made = recipe_for(
        name,
        folder,
        base,
        rows=(31, 7),
        method=dict(method),
        optim=OPTIM,
        train=steps,
        data={"max_lost": 1.0},
    )
    if stage == "dpo":
        made["stage"] = {**made["stage"], "reference": "start"}
    if stage in ("sft", "pt"):
        made["stage"] = {"type": stage}
        write_alpaca(folder / "alpaca.json", 31)
        write_alpaca(folder / "alpaca_eval.json", 7)
        kinds = {"sft": {}, "pt": {"columns": {"prompt": "output"}}}[stage]
        for key, name in (("train", "alpaca"), ("eval", "alpaca_eval")):
            made["data"][key] = [{"file_name": f"{name}.json", **kinds}]
    return made


def divided(base: Recipe, output: Path, zero: int | None, **parallel: Any) -> Recipe:
    """The recipe for two processes, under ZeRO; one process has both shares of the rows."""
    made = copy.deepcopy(base)
    made["train"] |= {"output": str(output)}
    made["parallel"] = {"type": "deepspeed", "zero": zero, "config": ALL_DIVIDED, **parallel}
    return made


def alone(base: Recipe, output: Path, **train: Any) -> Recipe:
    made = copy.deepcopy(base)
    made["train"] |= {"output": str(output), "rows_per_device": 4, **train}
    made.pop("parallel", None)
    return made


def goes_on(made: Recipe, checkpoint: Path) -> Recipe:
    """The recipe, with its run directory as it was left after this checkpoint."""
    output = Path(made["train"]["output"])
    output.mkdir(parents=True)
    for name in ("recipe.yaml", "trainer_log.jsonl"):
        shutil.copy(checkpoint.parent / name, output / name)
    shutil.copytree(checkpoint, output / checkpoint.name)
    # Another number of processes shares the same rows out anew.
    made["train"] |= {"resume": "auto", "allow_changes": True}
    return made


@dataclass
class Runs:
    """What was trained: a plain run for each label, and the one that is to equal it."""

    folder: Path
    one: dict[str, Path] = field(default_factory=dict)
    recipes: dict[str, Recipe] = field(default_factory=dict)
    changes: dict[str, processes.Change | None] = field(default_factory=dict)
    said: dict[str, list[str]] = field(default_factory=dict)

    def two(self, label: str) -> Path:
        return Path(self.recipes[label]["train"]["output"])

    def base(self, name: str, made: Recipe, **train: Any) -> Recipe:
        """Trains `made` in one plain process under `name`."""
        output = self.folder / "one" / name
        luthier.train(alone(made, output, **train), quiet=True)
        self.one[name] = output
        return made

    def add(self, label: str, made: Recipe, change: processes.Change | None = None) -> None:
        self.recipes[label], self.changes[label] = made, change

    def train(self, count: int = 2, only: Sequence[str] | None = None) -> None:
        """All that was added and not trained yet, or `only` some of it."""
        todo = [label for label in only or self.recipes if label not in self.said]
        work = [(self.recipes[label], self.changes[label]) for label in todo]
        if not todo:
            return
        said = processes.train_in_processes(work, self.folder / f"said-{len(self.said)}", count)
        self.said |= {label: list(texts) for label, texts in zip(todo, zip(*said, strict=True), strict=True)}


def weights(run: Path) -> dict[str, torch.Tensor]:
    files = [
        *run.glob("model*.safetensors"),
        *run.glob("adapter_model.safetensors"),
        *run.glob("value_head*.safetensors"),
    ]
    assert files
    return {f"{file.name}:{name}": tensor for file in files for name, tensor in load_file(file).items()}


def logged(run: Path, *keys: str) -> list[float]:
    lines = [
        json.loads(line) for line in (run / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [line[key] for key in keys for line in lines if key in line]


def parallel_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))["parallel"]
    return found


def furthest(found: Path, expected: Path) -> float:
    """The largest difference of two weights after runs whose weights moved by some 0.04."""
    one, two = weights(found), weights(expected)
    assert one.keys() == two.keys()
    assert all(one[name].shape == two[name].shape and one[name].dtype == two[name].dtype for name in one)
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def assert_same_run(found: Path, expected: Path, tolerance: float = 1e-5) -> None:
    """Losses, norms, evaluations, weights, and what the last checkpoint keeps of the optimizer."""
    for key in ("loss", "grad_norm", "eval_loss"):
        values = logged(expected, key)
        assert len(set(values)) > (key != "eval_loss")
        assert logged(found, key) == pytest.approx(values, rel=1e-4, abs=1e-7), key
    assert max(logged(expected, "grad_norm")) > OPTIM["max_grad_norm"]  # clipping was active
    assert furthest(found, expected) < tolerance
    one, two = (torch.load(run / "checkpoint-4" / "optimizer.pt") for run in (found, expected))
    assert one["param_groups"] == two["param_groups"]
    assert one["state"].keys() == two["state"].keys()
    for number, state in two["state"].items():
        assert one["state"][number].keys() == state.keys()
        for name, value in state.items():
            torch.testing.assert_close(one["state"][number][name], value, rtol=1e-3, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# Changes


def every_pass_is_the_last(rank: int) -> AbstractContextManager[Any]:
    """Each pass of a step is at DeepSpeed's boundary."""
    from luthier.parallel.deepspeed import DeepSpeed

    synchronizing = DeepSpeed.synchronizing

    def wrong(self: DeepSpeed, accelerator: Any, model: Any, *, last: bool) -> Any:
        return synchronizing(self, accelerator, model, last=True)

    return patch.object(DeepSpeed, "synchronizing", wrong)


def nan_in_third_step(rank: int) -> AbstractContextManager[Any]:
    """One process's third step has a loss that is no number."""
    from luthier.parallel.deepspeed import DeepSpeed

    backward = DeepSpeed.backward

    def broken(self: DeepSpeed, accelerator: Any, model: Any, loss: torch.Tensor, *, last: bool) -> None:
        broken.passes += last  # type: ignore[attr-defined]
        factor = float("nan") if rank == 1 and broken.passes == 3 else 1.0  # type: ignore[attr-defined]
        backward(self, accelerator, model, loss * factor, last=last)

    broken.passes = 0  # type: ignore[attr-defined]
    return patch.object(DeepSpeed, "backward", broken)
