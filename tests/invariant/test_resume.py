"""Resumed = uninterrupted, bit by bit, from every checkpoint, with dropout, accumulation and two epochs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import luthier
from tests.tiny import chat_model, write_alpaca

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "rank": 4, "dropout": 0.2},
    "pissa": {"type": "lora", "rank": 4, "init": "pissa", "init_iterations": 2, "dropout": 0.2},
    "full": {"type": "full"},
    "freeze": {"type": "freeze", "layers": 1, "extra_modules": ["embed_tokens"]},
    "llama_pro": {"type": "llama_pro", "blocks": 2},
    "oft": {"type": "oft", "block_size": 8, "dropout": 0.2},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("model"), attention_dropout=0.1)


def recipe(model: Path, folder: Path, method: dict[str, Any], batch: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": {"path": str(model)},
        "data": {
            "train": ["rows.json"],
            "directory": str(folder),
            "cache": str(folder / "cache"),
            "dev_split": 4,
        },
        "method": method,
        "optim": {"type": "adamw", "lr": 1e-2, "weight_decay": 0.1, "warmup": 0.2},
        "train": {
            **batch,
            "epochs": 2,
            "output": str(folder / "straight"),
            "log_every": 1,
            "save_every": 1,
            "eval_every": 2,
            "plots": False,
        },
    }


def weights(run: Path) -> dict[str, torch.Tensor]:
    (file,) = run.glob("*.safetensors")
    return load_file(file)


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "trainer_log.jsonl").read_text().splitlines()]
    return {line["current_steps"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.parametrize(
    "batch", [{"rows_per_device": 2, "accumulation": 3}, {"tokens_per_batch": 200}], ids=["rows", "tokens"]
)
@pytest.mark.parametrize("method", METHODS)
def test_resume_at_every_checkpoint_is_bitwise(
    method: str, batch: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    write_alpaca(tmp_path / "rows.json", 20)
    base = recipe(model, tmp_path, METHODS[method], batch)
    straight = luthier.train(base, quiet=True).output
    expected, expected_losses = weights(straight), losses(straight)
    checkpoints = sorted(straight.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert len(checkpoints) == len(expected_losses) >= 4
    for checkpoint in checkpoints[:-1]:
        resumed = tmp_path / f"from-{checkpoint.name}"
        resumed.mkdir()
        for name in ("recipe.yaml", "trainer_log.jsonl"):
            shutil.copy(straight / name, resumed / name)
        shutil.copytree(checkpoint, resumed / checkpoint.name)
        luthier.train(base, [f"train.output={resumed}", "train.resume=auto"], quiet=True)
        assert losses(resumed) == expected_losses
        for name, tensor in weights(resumed).items():
            assert torch.equal(tensor, expected[name]), (checkpoint.name, name)
        shutil.rmtree(resumed)


def test_different_seed_gives_different_weights(model: Path, tmp_path: Path) -> None:
    """The equality above could fail."""
    write_alpaca(tmp_path / "rows.json", 20)
    base = recipe(model, tmp_path, METHODS["lora"], {"rows_per_device": 2, "accumulation": 3})
    first = weights(luthier.train(base, ["train.max_steps=2"], quiet=True).output)
    second = weights(
        luthier.train(
            base, ["train.max_steps=2", "train.seed=7", f"train.output={tmp_path / 'other'}"], quiet=True
        ).output
    )
    assert any(not torch.equal(first[name], second[name]) for name in first)
