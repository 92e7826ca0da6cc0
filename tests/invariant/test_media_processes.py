"""Two processes of which one sees no picture are one process: losses and every weight, the tower's among it.

Rows are laid so that a step has its only picture in one process, none at all, and one in an earlier pass than the last.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import luthier
from tests.media import picture
from tests.multimodal import media_model
from tests.processes import train_in_processes

pytestmark = pytest.mark.slow

SEEN = ((0,), (), (2,), (1, 3), (0, 1, 2, 3))
"""The rows with a picture in each step of four rows, of one row in each pass."""
METHODS: dict[str, dict[str, Any]] = {
    "full": {"type": "full"},
    "lora": {"type": "lora", "rank": 4},
    "checkpointed": {"type": "full"},
}


def _recipe(folder: Path, base: Path, name: str, count: int) -> dict[str, Any]:
    return {
        "model": {
            "path": str(base),
            "frozen_parts": [],
            "gradient_checkpointing": name == "checkpointed",
        },
        "data": {
            "train": [
                {
                    "file_name": "rows.json",
                    "formatting": "openai",
                    "columns": {"messages": "messages", "images": "images"},
                }
            ],
            "directory": str(folder),
            "cache": str(folder / f"cache-{count}"),
            "shuffle": False,
        },
        "method": METHODS[name],
        # Moments and decay move a weight whose gradient is zero, and leave alone one that has none.
        "optim": {"type": "adamw", "lr": 0.01, "weight_decay": 0.1, "schedule": "constant", "eps": 1e-4},
        "train": {
            "rows_per_device": 4 // count,
            "tokens_per_pass": 1,
            "epochs": 1,
            "log_every": 1,
            "plots": False,
            "output": str(folder / f"{name}-{count}"),
        },
    }


def _rows(folder: Path) -> None:
    rows = []
    for step, seen in enumerate(SEEN):
        for k in range(4):
            images = (
                [picture(folder / f"{step}-{k}.png", 40 + 9 * k, 30, seed=step).name] if k in seen else []
            )
            question = {"role": "user", "content": "<image>" * len(images) + f"What is in {k}?"}
            answer = {"role": "assistant", "content": f"It is {k} of {step}."}
            rows.append({"messages": [question, answer], "images": images})
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")


def _log(run: Path, key: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (run / "trainer_log.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media-processes")
    base = media_model(folder / "base", "qwen2.5-vl")
    _rows(folder)
    runs = [(_recipe(folder, base, name, 2), None) for name in METHODS]
    said = train_in_processes(runs, folder / "said")
    assert said == [[""] * len(runs)] * 2
    for name in METHODS:
        luthier.train(_recipe(folder, base, name, 1), quiet=True)
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_are_one(name: str, folder: Path) -> None:
    one, two = folder / f"{name}-1", folder / f"{name}-2"
    assert len(_log(one)) == len(SEEN)
    assert _log(two) == pytest.approx(_log(one), abs=1e-4)
    file = "adapter_model.safetensors" if name == "lora" else "model.safetensors"
    ours, theirs = load_file(two / file), load_file(one / file)
    assert ours.keys() == theirs.keys()
    for key, weight in theirs.items():
        torch.testing.assert_close(
            ours[key], weight, rtol=1e-4, atol=2e-5, msg=lambda text, k=key: f"{k}: {text}"
        )
    if name != "lora":
        base = load_file(folder / "base" / file)
        moved = {key for key in base if not torch.equal(base[key], theirs[key])}
        assert any(".visual.blocks." in key or key.startswith("visual.blocks.") for key in moved)
