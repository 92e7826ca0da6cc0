"""Two processes that share a run under DistributedDataParallel are one: losses, gradients, evaluations, files.

All runs in two processes are made once, in one pair of them; the other half of each comparison runs here. Sums over
rows are the same but for their order: some float32 roundings (6e-8) in each gradient, which steps of SGD carry on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import luthier
from luthier.trainer.checkpoint import verify
from tests import ddp, processes
from tests.compared import padding_model, sharp_model
from tests.online import logged

pytestmark = pytest.mark.slow

TOLERANCE = 2e-4
"""Of any number of the log, relative; differences of nearly equal numbers have 1e-5 more."""
MATRIX = [(stage, method) for stage in ("pt", "sft", "dpo", "kto", "rm") for method in ("full", "lora")]
VARIANTS = (
    "bco-full",
    "tokens",
    "mixture",
    "packed",
    "padded",
    "freeze",
    "eva",
    "answers",
    "best",
    "precomputed",
    "loop",
)
EVERY = [*(f"{stage}-{method}" for stage, method in MATRIX), *VARIANTS]


def recipes(folder: Path) -> dict[str, dict[str, Any]]:
    """Of one process, by name."""
    base, padding = sharp_model(folder / "model"), padding_model(folder / "padding")
    methods = {"full": ddp.FULL, "lora": ddp.LORA}

    def made(name: str, stage: str, method: dict[str, Any] = ddp.FULL, /, **sections: Any) -> dict[str, Any]:
        return ddp.recipe(folder / name, base, stage, method, **sections)

    found = {f"{stage}-{name}": made(f"{stage}-{name}", stage, methods[name]) for stage, name in MATRIX}
    found["bco-full"] = made("bco-full", "bco")
    found["tokens"] = made("tokens", "sft")
    del found["tokens"]["train"]["rows_per_device"], found["tokens"]["train"]["accumulation"]
    found["tokens"]["train"] |= {"tokens_per_batch": 250, "tokens_per_pass": 90}
    found["mixture"] = made("mixture", "sft", data={"mix": {"weights": {"a": 3, "b": 1}}})
    found["packed"] = made("packed", "sft", data={"packing": True, "max_length": 128})
    found["padded"] = ddp.recipe(folder / "padded", padding, "dpo", ddp.LORA)
    found["freeze"] = made("freeze", "dpo", {"type": "freeze", "layers": 1})
    found["eva"] = made("eva", "sft", {**ddp.LORA, "init": "eva"})
    found["answers"] = made("answers", "sft", generation={"max_new_tokens": 6})
    found["answers"]["train"] |= {"generate_at_eval": {"max_samples": 5}, "epochs": 1}
    plateau = {"schedule": "reduce_lr_on_plateau", "schedule_options": {"patience": 0}}
    found["best"] = made("best", "sft", optim={**plateau, "lr": 3.0})
    found["best"]["train"] |= {"eval_every": 2, "save_every": 2, "load_best": True, "epochs": 3}
    found["best"]["train"] |= {"early_stopping": {"patience": 3}}
    found["precomputed"] = made("precomputed", "dpo", stage={"reference": "precompute"})
    found["loop"] = made("loop", "sft", ddp.LORA)
    found["loop"]["train"] |= {"bad_numbers": {"action": "skip"}}
    return found


@dataclass
class Runs:
    """One process's runs and where those of two processes are; what was raised by each process."""

    folder: Path
    one: dict[str, Path]
    recipes: dict[str, dict[str, Any]]
    said: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def two(self, name: str) -> Path:
        return self.folder / "two" / name


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("ddp")
    every = recipes(folder)
    torch.set_num_threads(1)
    one = {name: luthier.train(base, quiet=True).output for name, base in every.items()}
    runs = Runs(folder, one, every)
    shutil.rmtree(folder / "precomputed" / "cache" / "reference")  # two processes compute their own
    made: dict[str, tuple[Mapping[str, Any], processes.Change | None]] = {}

    def add(label: str, name: str, change: processes.Change | None = None, **train: Any) -> None:
        made[label] = (ddp.shared_out(every[name], runs.two(label), 2, **train), change)

    for name in every:
        add(name, name)
    add("local statistics", "kto-full", ddp.local_statistics)
    add("local sums", "tokens", ddp.local_metrics)
    for action in ("stop", "skip", "rewind"):
        add(f"nan-{action}", "loop", ddp.nan_on_second, bad_numbers={"action": action}, save_every=1)
    add("signalled", "loop", ddp.signal_after_second)
    add("goes on", "loop", output=str(runs.two("signalled")), resume="auto")
    add("checkpoint", "loop", ddp.signal_after_second)
    again = {"output": str(runs.two("checkpoint")), "resume": "auto"}
    add("unreadable", "loop", ddp.unreadable_on_second, **again)
    add("crash", "loop", ddp.crash_on_second)
    add("full disk", "loop", ddp.full_disk_on_first)
    add("stopped", "loop", callbacks=["tests.ddp:StopAfterTwo"])
    add("three rows", "loop", output=str(runs.two("checkpoint")), resume="auto", accumulation=3)
    said = processes.train_in_processes(list(made.values()), folder / "said")
    runs.said = dict(zip(made, zip(*said, strict=True), strict=True))
    return runs


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in sorted(run.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def apart(found: Path, expected: Path) -> float:
    """The largest relative difference of a number of two logs; their lines and names have to be the same."""
    lines, wanted = logged(found), logged(expected)
    assert len(lines) == len(wanted)
    worst = 0.0
    for line, other in zip(lines, wanted, strict=True):
        assert line.keys() == other.keys()
        for name, value in other.items():
            if isinstance(value, float):
                worst = max(worst, abs(line[name] - value) / (abs(value) + 0.05))
            else:
                assert line[name] == value, (name, other["current_steps"])
    return worst


def weights_apart(found: Path, expected: Path) -> float:
    """The largest difference of a weight, relative to the largest weight of its tensor."""
    one, two = weights(found), weights(expected)
    assert one.keys() == two.keys()
    return max(
        float((one[name] - two[name]).abs().max() / two[name].abs().max().clamp(min=1e-3)) for name in two
    )


# ---- equality ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_two_processes_are_one(name: str, runs: Runs) -> None:
    """Steps, epochs, learning rates, token counts, operations and names are equal; all else to rounding."""
    one, two = runs.one[name], runs.two(name)
    assert runs.said[name] == ("", "")
    assert apart(two, one) < TOLERANCE
    assert weights_apart(two, one) < TOLERANCE
    end, expected = (json.loads((run / "all_results.json").read_text()) for run in (two, one))
    for key in ("train_tokens", "total_flos", "epoch"):
        assert end[key] == expected[key]
    record = json.loads((two / "run.json").read_text())["parallel"]
    assert record == {"type": "ddp", "processes": 2, "wrapped": "DistributedDataParallel"}


def test_what_was_compared_is_what_was_meant(runs: Runs) -> None:
    names = {name for line in logged(runs.two("sft-full")) for name in line}
    assert {"loss/a", "loss/b", "eval_a_loss", "eval_b_accuracy", "eval_perplexity", "grad_norm"} <= names
    assert any("eval_rouge" in name for line in logged(runs.two("answers")) for name in line)
    assert any(line.get("kl", 0) > 1 for line in logged(runs.two("kto-full")))
    rates = [line["learning_rate"] for line in logged(runs.two("best")) if "learning_rate" in line]
    assert rates[-1] < rates[0]  # the plateau was seen
    steps = [line["current_steps"] for line in logged(runs.two("sft-full")) if "loss" in line]
    assert steps == list(range(1, 13))  # 21 rows by four, twice; each line written once


@pytest.mark.parametrize(
    ("fault", "of", "number"),
    [("local statistics", "kto-full", "loss"), ("local sums", "tokens", "eval_loss")],
)
def test_a_planted_fault_is_seen(fault: str, of: str, number: str, runs: Runs) -> None:
    assert runs.said[fault] == ("", "")
    found, expected = (
        [line[number] for line in logged(run) if number in line] for run in (runs.two(fault), runs.one[of])
    )
    assert len(found) == len(expected)
    assert max(abs(one - two) for one, two in zip(found, expected, strict=True)) > 20 * TOLERANCE


# ---- decisions ---------------------------------------------------------------------------------------------


def record(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "bad_numbers.jsonl").read_text().splitlines()]


def test_a_nan_on_one_process_stops_both(runs: Runs) -> None:
    first, second = runs.said["nan-stop"]
    assert first == second and first.startswith("BadNumbersError: step 3: the loss is nan; its rows are ")
    (entry,) = record(runs.two("nan-stop"))
    assert len(entry["rows"]) == 4  # of both processes, written by one


def test_a_nan_on_one_process_is_skipped_by_both(runs: Runs) -> None:
    assert runs.said["nan-skip"] == ("", "")
    assert [entry["current_steps"] for entry in record(runs.two("nan-skip"))] == [3]
    lines = {line["current_steps"]: line for line in logged(runs.two("nan-skip")) if "loss" in line}
    assert lines[3]["loss"] == "NaN" and lines[12]["bad_steps"] == 1
    assert lines[2]["loss"] == pytest.approx(logged(runs.one["loop"])[1]["loss"], rel=TOLERANCE)


def test_a_nan_on_one_process_rewinds_both(runs: Runs) -> None:
    assert runs.said["nan-rewind"] == ("", "")
    assert record(runs.two("nan-rewind"))[1]["not_trained"] == [3, 3]
    assert weights_apart(runs.two("nan-rewind"), runs.two("nan-skip")) < TOLERANCE


def test_a_signal_to_one_process_stops_both_and_they_go_on_bitwise(runs: Runs) -> None:
    first, second = runs.said["signalled"]
    assert first == second and first.startswith("RunInterrupted: SIGTERM: stopped after step 2 of 12")
    assert runs.said["goes on"] == ("", "")
    found, expected = weights(runs.two("signalled")), weights(runs.two("loop"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_callback_that_stops_one_process_stops_both(runs: Runs) -> None:
    assert runs.said["stopped"] == ("", "")
    assert [line["current_steps"] for line in logged(runs.two("stopped")) if "loss" in line] == [1, 2]


@pytest.mark.parametrize(
    ("name", "text", "failed"),
    [
        ("unreadable", "CheckpointError: {}adapter_model.safetensors: input/output error", 1),
        ("crash", "{}OSError: [Errno 5] Input/output error", 1),
        ("full disk", "CheckpointError: {}no room", 0),
    ],
)
def test_what_fails_on_one_process_ends_both(name: str, text: str, failed: int, runs: Runs) -> None:
    said = runs.said[name]
    other = f"process {failed}: "
    if name == "crash":
        assert said == (f"ProcessError: {other}{text.format('')}", text.format(""))
    else:
        assert said[failed] == text.format("")
        assert said[1 - failed] == text.format(other)


def test_the_rows_of_a_step_are_those_of_the_checkpoint(runs: Runs) -> None:
    first, second = runs.said["three rows"]
    assert first.removeprefix("CheckpointError: process 0: ") == first
    assert "rows of a step (train.rows_per_device x train.accumulation x processes) was 4 and is 6" in first
    assert "rows of a step" in second
    verify(runs.two("checkpoint") / "checkpoint-2")
