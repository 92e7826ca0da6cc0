"""How a DPO run moves the rewards of pairs that it never saw.

    python benchmarks/dpo_held_out.py --model embedded --data FOLDER_OF_DPO_EN_DEMO

The pairs held out are drawn once by the seed; their answers' rewards are measured in the course of the run. Before the
first step policy and reference are one model, every reward is 0 and every pair a tie, so the accuracy to compare with
is one half, and the 95 % interval (Wilson, 1927) stands beside what was reached. Seconds are not compared with
anything.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from importlib import metadata
from pathlib import Path

import checkout
import torch
from rm_cross_validation import DATA_SET, LIBRARIES, data_set, wilson

import luthier


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--data", type=Path, default=checkout.REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--held-out", type=int, default=50)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rows", type=int, default=8, help="pairs of an optimizer step")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "dpo_held_out.json"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        recipe = {
            "model": {"path": arguments.model},
            "data": {
                "train": [data_set(arguments.data / DATA_SET)],
                "max_length": arguments.max_length,
                "overflow": "truncate",
                "max_lost": None,
                "dev_split": arguments.held_out,
                "cache": str(place / "cache"),
            },
            "stage": {"type": "dpo", "beta": arguments.beta, "reference": "precompute"},
            "method": {"type": "lora", "rank": arguments.rank},
            "optim": {"lr": arguments.lr, "warmup": 0.1},
            "train": {
                "output": str(place / "run"),
                "max_steps": arguments.steps,
                "rows_per_device": arguments.rows,
                "eval_every": max(1, arguments.steps // 2),
                "save_every": None,
                "log_every": 1,
                "plots": False,
                "seed": arguments.seed,
            },
        }
        result = luthier.train(recipe)
        lines = [json.loads(line) for line in (result.output / "trainer_log.jsonl").read_text().splitlines()]
    kept = ("current_steps", "eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")
    at_step = {line["current_steps"]: line for line in lines if "eval_loss" in line}
    evaluations = [{key: line[key] for key in kept} for line in at_step.values()]
    reached = evaluations[-1]["eval_rewards/accuracies"]
    low, high = wilson(reached * arguments.held_out, arguments.held_out)
    settings = {name: value for name, value in vars(arguments).items() if name not in ("data", "output")}
    report = {
        "settings": {"data_set": DATA_SET, **settings},
        "versions": {
            "luthier": luthier.__version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in LIBRARIES},
        },
        "threads": torch.get_num_threads(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "accuracy": reached,
        "interval_95": [low, high],
        "evaluations": evaluations,
        "training_loss": [line["loss"] for line in lines if "loss" in line],
    }
    arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"accuracy of {arguments.held_out} pairs held out: {reached:.3f} (95 % {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
