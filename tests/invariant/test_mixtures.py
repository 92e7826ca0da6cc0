"""Runs over mixtures: resumed = uninterrupted bit by bit, two processes = one, and the losses of the sets in the log."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import luthier
from tests.processes import train_in_processes
from tests.tiny import chat_model, write_alpaca

SIZES = {"small": 5, "large": 23}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("model"), attention_dropout=0.1)


def recipe(model: Path, folder: Path, batch: dict[str, Any], **data: Any) -> dict[str, Any]:
    for name, size in SIZES.items():
        write_alpaca(folder / f"{name}.json", size)
    return {
        "model": {"path": str(model)},
        "data": {
            "train": [f"{name}.json" for name in SIZES],
            "directory": str(folder),
            "cache": str(folder / "cache"),
            "mix": {"weights": {"small": 2, "large": 1}, "until": "total"},
            **data,
        },
        "method": {"type": "lora", "rank": 4, "dropout": 0.2},
        "optim": {"type": "adamw", "lr": 1e-2},
        "train": {
            **batch,
            "epochs": 3,
            "output": str(folder / "straight"),
            "log_every": 1,
            "save_every": 1,
            "plots": False,
        },
    }


def weights(run: Path) -> dict[str, torch.Tensor]:
    (file,) = run.glob("*.safetensors")
    return load_file(file)


def lines(run: Path) -> dict[int, dict[str, float]]:
    records = [json.loads(line) for line in (run / "trainer_log.jsonl").read_text().splitlines()]
    return {
        record["current_steps"]: {
            name: value for name, value in record.items() if name == "loss" or name.startswith("loss/")
        }
        for record in records
        if "loss" in record
    }


@pytest.mark.parametrize(
    ("batch", "packing"),
    [({"rows_per_device": 2, "accumulation": 2}, True), ({"tokens_per_batch": 250}, False)],
    ids=["packed rows", "tokens"],
)
def test_resume_in_every_epoch_is_bitwise(
    batch: dict[str, Any], packing: bool, model: Path, tmp_path: Path
) -> None:
    base = recipe(model, tmp_path, batch, packing=packing, max_length=128)
    straight = luthier.train(base, quiet=True).output
    expected, logged = weights(straight), lines(straight)
    steps = len(logged)
    assert steps % 3 == 0 and steps >= 9  # three epochs of equally many steps
    assert {name for line in logged.values() for name in line} == {"loss", "loss/small", "loss/large"}
    assert all(0 < value < 10 for line in logged.values() for value in line.values())
    for step in (steps // 3 - 1, steps // 3 + 1, steps - 1):
        resumed = tmp_path / f"from-{step}"
        resumed.mkdir()
        for name in ("recipe.yaml", "trainer_log.jsonl"):
            shutil.copy(straight / name, resumed / name)
        shutil.copytree(straight / f"checkpoint-{step}", resumed / f"checkpoint-{step}")
        luthier.train(base, [f"train.output={resumed}", "train.resume=auto"], quiet=True)
        assert lines(resumed) == logged
        for name, tensor in weights(resumed).items():
            assert torch.equal(tensor, expected[name]), (step, name)


def test_losses_of_sets_change_nothing_and_average_to_the_loss(model: Path, tmp_path: Path) -> None:
    """One set of the same rows trains the same weights bit by bit; without it the sums are logged."""
    base = recipe(model, tmp_path, {"rows_per_device": 4, "accumulation": 1}, mix={}, shuffle=False)
    both = luthier.train(base, ["train.epochs=1"], quiet=True).output
    rows = [row for name in SIZES for row in json.loads((tmp_path / f"{name}.json").read_text())]
    (tmp_path / "merged.json").write_text(json.dumps(rows))
    merged = [f"train.output={tmp_path / 'merged'}", "data.train=[merged.json]", "train.epochs=1"]
    one = luthier.train(base, merged, quiet=True).output
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, weights(both)[name]), name
    single, split = lines(one), lines(both)
    assert [line["loss"] for line in single.values()] == [line["loss"] for line in split.values()]
    assert all(set(line) == {"loss"} for line in single.values())
    # rows 0 to 3, 4 to 7, ... of 5 small and 23 large ones
    assert set(split[1]) == {"loss", "loss/small"} and set(split[3]) == {"loss", "loss/large"}
    assert split[1]["loss/small"] == pytest.approx(split[1]["loss"], rel=1e-6)
    low, high = sorted((split[2]["loss/small"], split[2]["loss/large"]))
    assert low < split[2]["loss"] < high


def test_two_processes_log_the_losses_of_one(model: Path, tmp_path: Path) -> None:
    base = recipe(model, tmp_path, {"tokens_per_batch": 250})
    base["method"]["dropout"], base["model"]["attention"] = 0.0, "sdpa"
    base["train"] |= {"epochs": 1, "save_every": None}
    quiet = chat_model(tmp_path / "model")
    base["model"]["path"] = str(quiet)
    one = lines(luthier.train(base, quiet=True).output)
    base["train"]["output"] = str(tmp_path / "two")
    assert train_in_processes([(base, None)], tmp_path / "said") == [[""], [""]]
    two = lines(tmp_path / "two")
    assert one.keys() == two.keys()
    for step, line in one.items():
        assert two[step] == pytest.approx(line, rel=1e-4), step
