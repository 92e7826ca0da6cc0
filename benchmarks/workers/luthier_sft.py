"""Luthier through its public function, from the text of the data set."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import clock

import luthier


def main() -> None:
    job = clock.load_job()
    clock.install()
    output = Path(job["output"]) / "run"
    luthier.train(
        {
            "model": {"path": job["model"], "dtype": "float32"},
            "data": {
                "train": [job["dataset"]],
                "directory": job["data"],
                "max_samples": len(job["rows"]),
                "max_length": job["max_length"],
                "shuffle": False,
            },
            "stage": {"type": "sft"},
            "method": {"type": "lora", "rank": job["rank"], "alpha": job["alpha"]},
            "optim": {"type": "adamw", "lr": job["lr"], "schedule": "constant"},
            "train": {
                "rows_per_device": job["rows_per_step"],
                "max_steps": job["steps"],
                "output": str(output),
                "log_every": 1,
                "save_every": None,
                "plots": False,
                "seed": job["seed"],
            },
        },
        quiet=True,
    )
    lines = (output / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    counted = [entry["tokens"] for entry in map(json.loads, lines) if "loss" in entry]
    clock.report(job, "luthier", [after - before for before, after in pairwise([0, *counted])])


if __name__ == "__main__":
    main()
