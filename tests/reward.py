"""A small set of pairs that a tiny model can learn to tell apart, and the recipe of a run over it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tests.tiny import chat_model

PAIRS = 24
HELD_OUT = 6


def write_pairs(file: Path, num_pairs: int = PAIRS) -> list[dict[str, str]]:
    """Alpaca's ranking format: the better answer counts, the worse one refuses; of many lengths."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "instruction": f"Count to {n}, for the {k}th time.",
            "input": "",
            "chosen": " ".join(str(i) for i in range(1, n + 1)),
            "rejected": " ".join(["no"] * int(rng.integers(1, 7))),
        }
        for k, n in enumerate(rng.integers(2, 12, num_pairs).tolist())
    ]
    file.write_text(json.dumps(rows), encoding="utf-8")
    return rows


def reward_recipe(folder: Path, method: dict[str, Any], **train: Any) -> dict[str, Any]:
    """A recipe over `folder`/pairs.json on `folder`/base; both are made where they are absent."""
    if not (folder / "base").is_dir():
        chat_model(folder / "base")
        write_pairs(folder / "pairs.json")
    columns = {"chosen": "chosen", "rejected": "rejected"}
    pairs = {"file_name": str(folder / "pairs.json"), "ranking": True, "columns": columns}
    data = {"train": [pairs], "dev_split": HELD_OUT, "max_length": 128, "cache": str(folder / "cache")}
    settings = {"rows_per_device": 6, "max_steps": 6, "log_every": 1, "save_every": None, "plots": False}
    return {
        "model": {"path": str(folder / "base")},
        "data": data,
        "stage": {"type": "rm"},
        "method": method,
        "optim": {"lr": 1e-2},
        "train": {"output": str(folder / "run"), **settings, **train},
    }


def plain_scores(model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]]) -> Tensor:
    """(n, 2) scores of the better and the worse answers by plain transformers, two rows at a time, padded right."""
    found = []
    for row in rows:
        chats = [
            [
                {"role": "user", "content": row["instruction"]},
                {"role": "assistant", "content": row[name]},
            ]
            for name in ("chosen", "rejected")
        ]
        texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
        batch = tokenizer(
            texts, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt"
        )
        with torch.no_grad():
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            found.append(model(**inputs).logits[:, 0].float())
    return torch.stack(found)
