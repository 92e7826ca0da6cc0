"""Runs of ppo and grpo on a tiny model: prompts, rewards and a recipe as a user would write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.tiny import chat_model

REWARD = '''
"""Answers with many characters below a limit earn more; it is one of the prompts' own."""


def low(prompt, completion, row):
    limit = row["limit"]
    return sum(ord(character) < limit for character in completion) / 10


def low_or_same(prompt, completion, row):
    return 1.0 if row["limit"] % 2 else low(prompt, completion, row)


def broken(prompt, completion, row):
    if row["limit"] == 103:
        raise ValueError("no such thing")
    return 0.5


def same(prompt, completion, row):
    return 1.0
'''

TIMES = ("_seconds", "_per_second", "_runtime", "_time", "memory", "percentage", "resumed_from")
"""Ends of names of what differs between two equal runs."""


def write_prompts(file: Path, num_rows: int) -> None:
    """Alpaca rows without answers."""
    rows = [{"instruction": f"Say {n}." + "!" * (n % 4), "limit": 100 + n} for n in range(num_rows)]
    file.write_text(json.dumps(rows), encoding="utf-8")


def online_recipe(folder: Path, stage: Mapping[str, Any], num_rows: int = 11, **model: Any) -> dict[str, Any]:
    """A recipe that logs every step, with all files that it names written into `folder`; `model` changes its config."""
    folder.mkdir(parents=True, exist_ok=True)
    chat_model(folder / "model", **model)
    write_prompts(folder / "rows.json", num_rows)
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    own: dict[str, Any] = {"rewards": [{"type": "function", "path": f"{folder / 'reward.py'}:low"}]}
    return {
        "model": {"path": str(folder / "model")},
        "data": {"train": ["rows.json"], "directory": str(folder), "cache": str(folder / "cache")},
        "stage": {**own, "prompts_per_rollout": 3, "samples_every": 1, **stage},
        "method": {"type": "lora", "rank": 4},
        "optim": {"type": "adamw", "lr": 1e-2},
        "generation": {"max_new_tokens": 8, "rows": 4, "memory_gib": 0.1},
        "train": {
            "output": str(folder / "run"),
            "epochs": 1,
            "log_every": 1,
            "save_every": None,
            "plots": False,
        },
    }


def logged(run: Path, name: str = "trainer_log.jsonl") -> list[dict[str, Any]]:
    """The lines of a log without what takes another time in every run."""
    lines = [json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith(TIMES)} for line in lines]
