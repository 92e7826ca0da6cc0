"""Processes that divide a model among them (`parallel: fsdp2`) are one process: losses, weights, files.

All runs in two processes are made once, in one pair of them; the other half of each comparison runs here.
"""

from __future__ import annotations

import copy
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
from tests import processes
from tests.online import logged
from tests.tiny import FEEDBACK_COLUMNS, PAIR_COLUMNS, chat_model, write_alpaca, write_feedback, write_pairs

FSDP = {"type": "fsdp2"}
SGD = {"type": "sgd", "lr": 0.1, "momentum": 0.9, "schedule": "constant"}
LORA = {"type": "lora", "rank": 4, "targets": "all-linear"}
STEPS = 4


@dataclass(frozen=True)
class Case:
    """What a run is made of, beside what all are; `wide` allows more than rounding of sums."""

    stage: dict[str, Any] = field(default_factory=lambda: {"type": "sft"})
    method: dict[str, Any] = field(default_factory=lambda: {"type": "full"})
    optim: dict[str, Any] = field(default_factory=lambda: SGD)
    parallel: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    family: str = "llama"
    wide: float = 1.0
    slow: bool = False


CASES: dict[str, Case] = {
    "sft": Case(),
    "sft-lora": Case(method=LORA, optim={"type": "adamw", "lr": 1e-2}),
}


def recipe(folder: Path, name: str) -> dict[str, Any]:
    case = CASES[name]
    path = folder / case.family
    if not path.is_dir():
        chat_model(path, case.family)
    kind = case.stage["type"]
    data: dict[str, Any] = {"file_name": str(folder / f"{kind}.json")}
    if kind in ("dpo", "rm"):
        write_pairs(folder / f"{kind}.json", 30)
        data |= PAIR_COLUMNS
    elif kind == "kto":
        write_feedback(folder / f"{kind}.json", 30)
        data |= FEEDBACK_COLUMNS
    else:
        write_alpaca(folder / f"{kind}.json", 40)
    train: dict[str, Any] = {"epochs": 2, "max_steps": STEPS, "tokens_per_batch": 512, "tokens_per_pass": 96}
    train |= {"log_every": 1, "save_every": None, "plots": False, "eval_every": 2}
    return {
        "model": {"path": str(path), **case.model},
        "data": {"train": [data], "dev_split": 5, "max_length": 96, "cache": str(folder / "cache")},
        "stage": case.stage,
        "method": case.method,
        "optim": case.optim,
        "train": {**train, **case.train, "output": str(folder / "one" / name)},
    }
