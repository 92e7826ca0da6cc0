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
import tempfile
from pathlib import Path

import luthier
from preference import DATA_SET, lora_recipe, parser_of, surroundings, wilson


def parsed() -> argparse.Namespace:
    parser = parser_of(__doc__, "dpo_held_out.json")
    parser.add_argument("--held-out", type=int, default=50)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--beta", type=float, default=0.1)
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    with tempfile.TemporaryDirectory() as name:
        recipe = lora_recipe(
            arguments,
            arguments.data / DATA_SET,
            Path(name),
            stage={"type": "dpo", "beta": arguments.beta, "reference": "precompute"},
            data={"dev_split": arguments.held_out},
            train={
                "max_steps": arguments.steps,
                "eval_every": max(1, arguments.steps // 2),
                "log_every": 1,
            },
        )
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
        **surroundings(),
        "accuracy": reached,
        "interval_95": [low, high],
        "evaluations": evaluations,
        "training_loss": [line["loss"] for line in lines if "loss" in line],
    }
    arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"accuracy of {arguments.held_out} pairs held out: {reached:.3f} (95 % {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
