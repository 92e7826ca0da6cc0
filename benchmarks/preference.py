"""What benchmarks of runs on `dpo_en_demo` share: the data, the recipe's frame, and the interval of a share."""

from __future__ import annotations

import argparse
import math
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import checkout
import torch

import luthier

DATA_SET = "dpo_en_demo.json"
COLUMNS = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
LIBRARIES = ("torch", "transformers", "peft")


def parser_of(description: str | None, results: str) -> argparse.ArgumentParser:
    """Options of the model, the data and the LoRA run; `results` is the name of the file that is written."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--data", type=Path, default=checkout.REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8, help="pairs of an optimizer step")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / results)
    return parser


def data_set(file: Path) -> dict[str, Any]:
    return {"file_name": str(file), "ranking": True, "formatting": "sharegpt", "columns": COLUMNS}


def lora_recipe(
    arguments: argparse.Namespace,
    file: Path,
    place: Path,
    *,
    stage: dict[str, Any],
    data: dict[str, Any] | None = None,
    train: dict[str, Any],
) -> dict[str, Any]:
    """A LoRA run on the pairs of `file` in the folder `place`. A pair that is too long is cut, not left out."""
    return {
        "model": {"path": arguments.model},
        "data": {
            "train": [data_set(file)],
            "max_length": arguments.max_length,
            "overflow": "truncate",
            "max_lost": None,
            "cache": str(place / "cache"),
            **(data or {}),
        },
        "stage": stage,
        "method": {"type": "lora", "rank": arguments.rank},
        "optim": {"lr": arguments.lr, "warmup": 0.1},
        "train": {
            "output": str(place / "run"),
            "rows_per_device": arguments.rows,
            "save_every": None,
            "plots": False,
            "seed": arguments.seed,
            **train,
        },
    }


def surroundings() -> dict[str, Any]:
    """What the numbers were made with."""
    return {
        "versions": {
            "luthier": luthier.__version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in LIBRARIES},
        },
        "threads": torch.get_num_threads(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


def wilson(right: float, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a share of `total` draws."""
    share = right / total
    middle = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2)) / (1 + z**2 / total)
    return middle - half, middle + half
