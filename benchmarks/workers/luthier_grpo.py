"""Luthier through its public function, on the job's prompts; the end token is held back, as in the other contenders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import clock

import luthier
import luthier.online
from luthier.engine.precedence import rollout_settings
from luthier.trainer.rollouts import Rollouts
from luthier.types import GenerationSettings

REWARD = f"{Path(__file__).with_name('rewards_of_benchmark.py')}:luthier_reward"


def endless(*said: Any, **named: Any) -> GenerationSettings:
    """Answers go on to the limit of tokens."""
    return replace(rollout_settings(*said, **named), stop_ids=())


def recipe(job: dict[str, Any], output: Path) -> dict[str, Any]:
    prompts = output / "prompts.jsonl"
    prompts.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"instruction": text}) + "\n" for text in job["prompts"]]
    prompts.write_text("".join(rows), encoding="utf-8")
    return {
        "model": {"path": job["model"], "dtype": "float32"},
        "data": {"train": [str(prompts)], "shuffle": False, "cache": str(output / "cache")},
        "stage": {
            "type": "grpo",
            "rewards": [{"type": "function", "path": REWARD}],
            "prompts_per_rollout": job["prompts_per_step"],
            "group_size": job["group_size"],
            "share_prompts": job.get("share_prompts", True),
            "samples_every": None,
        },
        "method": {"type": "lora", "rank": job["rank"], "alpha": job["alpha"]},
        "optim": {"type": "adamw", "lr": job["lr"], "schedule": "constant"},
        "generation": {"max_new_tokens": job["answer_length"], "rows": job["rows_per_step"]},
        "train": {
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
    clock.time_calls(Rollouts, "passes", "rollout")
    luthier.online.rollout_settings = endless  # type: ignore[attr-defined]
    luthier.train(recipe(job, Path(job["output"])), quiet=True)
    clock.report(
        job,
        job["contender"],
        [job["rows_per_step"] * job["answer_length"]] * job["steps"],
        rollout_seconds=clock.RECORD.calls_of["rollout"],
    )


if __name__ == "__main__":
    main()
