"""Luthier through its public function, from the text of the data set; caches are its own and empty."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import clock

import luthier
from luthier.trainer.precompute import Precomputation


def recipe(job: dict[str, Any], output: Path) -> dict[str, Any]:
    return {
        "model": {"path": job["model"], "dtype": "float32"},
        "data": {
            "train": [job["dataset"]],
            "directory": job["data"],
            "max_samples": job["max_samples"],
            "max_length": job["max_length"],
            "overflow": "drop",
            "max_lost": None,
            "shuffle": False,
            "cache": str(output / "cache"),
        },
        "stage": {
            "type": "dpo",
            "loss": job["loss"],
            "beta": job["beta"],
            "share_prompts": job.get("share_prompts", True),
            "reference": "precompute" if job.get("precompute") else "start",
        },
        "method": {"type": "lora", "rank": job["rank"], "alpha": job["alpha"]},
        "optim": {"type": "adamw", "lr": job["lr"], "schedule": "constant"},
        "train": {
            "rows_per_device": job["rows_per_step"],
            "max_steps": job["steps"],
            "output": str(output / "run"),
            "log_every": 1,
            "save_every": None,
            "plots": False,
            "seed": job["seed"],
        },
    }


def main() -> None:
    job = clock.load_job()
    clock.install()
    clock.time_calls(Precomputation, "__call__", "precompute")
    luthier.train(recipe(job, Path(job["output"])), quiet=True)
    clock.report(job, job["contender"], clock.answer_tokens_of_steps(job))


if __name__ == "__main__":
    main()
