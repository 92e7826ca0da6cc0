"""Recipes that compare answers, on a tiny model and made-up rows, for the tests of what is done with a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import BloomConfig, BloomForCausalLM

from tests.tiny import (
    FEEDBACK_COLUMNS,
    PAIR_COLUMNS,
    chat_model,
    chat_tokenizer,
    write_feedback,
    write_pairs,
)

STAGES: dict[str, dict[str, Any]] = {
    "dpo": {"type": "dpo", "beta": 0.5},
    "orpo": {"type": "dpo", "loss": "orpo"},
    "kto": {"type": "kto", "desirable_weight": 2.0},
    "rm": {"type": "rm", "center": 0.01, "margin": 0.2},
}
LORA: dict[str, Any] = {"type": "lora", "rank": 4}
FULL: dict[str, Any] = {"type": "full"}


def sharp_model(folder: Path) -> Path:
    """A model with large weights, so that positions and neighbours show in its numbers."""
    return chat_model(folder, initializer_range=0.2)


def padding_model(folder: Path) -> Path:
    """A model whose rows are padded."""
    tokenizer = chat_tokenizer()
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4)
    BloomForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe_for(
    name: str, folder: Path, base: Path, /, *, rows: tuple[int, int] = (16, 6), **sections: dict[str, Any]
) -> dict[str, Any]:
    """So many rows to train on and to evaluate in `folder`, and the recipe of a stage, changed by `sections`: one with
    a `type` takes the place of another, others are merged."""
    write, columns = (write_feedback, FEEDBACK_COLUMNS) if name == "kto" else (write_pairs, PAIR_COLUMNS)
    write(folder / "rows.json", rows[0])
    write(folder / "held_out.json", rows[1], seed=1)
    recipe: dict[str, Any] = {
        "model": {"path": str(base)},
        "data": {
            "train": [{"file_name": "rows.json", **columns}],
            "eval": [{"file_name": "held_out.json", **columns}],
            "directory": str(folder),
            "cache": str(folder / "cache"),
        },
        "stage": STAGES[name],
        "method": LORA,
        "optim": {"type": "adamw", "lr": 0.01},
        "train": {
            "rows_per_device": 2,
            "accumulation": 2,
            "max_steps": 4,
            "log_every": 1,
            "output": str(folder / "run"),
        },
    }
    for section, values in sections.items():
        recipe[section] = values if "type" in values else {**recipe[section], **values}
    return recipe
