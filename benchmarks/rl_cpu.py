"""A GRPO step on a CPU, side by side: Luthier and TRL's GRPOTrainer, each in its variants.

    python benchmarks/rl_cpu.py
    python benchmarks/rl_cpu.py --rounds 1 --steps 2 --answer-length 16     # a short run

Every contender samples answers of the same length to the same prompts (the end token is held back), groups of the same
size, and takes one optimizer step of LoRA on all linear layers in float32 on them, in a process of its own; each round
runs all of them once and the next round starts with another one. Only ratios within a round are quoted. Sampling and
update are timed apart: the update is what a step takes beside the sampling and the rewards. Counted are the tokens of
the answers.

    luthier             prompts computed once for a group
    luthier_unshared    each answer with a prompt of its own
    trl                 TRL's defaults (activation checkpointing is one of them): all answers of a step at once
    trl_kept            without activation checkpointing
    trl_kept_accumulated   so, and one group at a time, accumulated to a step: less padding, less memory
"""

from __future__ import annotations

import argparse
from typing import Any

import pairs
import side_by_side
import summary
from rich.console import Console
from rich.table import Table
from side_by_side import Contender
from summary import Round, cell, judged, over_rounds, peak, ratios, speed

KEPT = {"gradient_checkpointing": False}
CONTENDERS = {
    "luthier": Contender("luthier_grpo.py"),
    "luthier_unshared": Contender("luthier_grpo.py", settings={"share_prompts": False}),
    "trl": Contender("trl_grpo.py", "trl_python"),
    "trl_kept": Contender("trl_grpo.py", "trl_python", KEPT),
    "trl_kept_accumulated": Contender("trl_grpo.py", "trl_python", {**KEPT, "one_group": True}),
}
WANTED = [
    (f"{label} of {mine} over {other}", value, True, ("over", mine, other, key))
    for other in ("trl", "trl_kept", "trl_kept_accumulated")
    for mine in ("luthier", "luthier_unshared")
    for label, key, value in (("update", "update", 2.0), ("whole step", "step", 1.0))
]


def parse() -> argparse.Namespace:
    parser = side_by_side.parser(
        __doc__, CONTENDERS, dataset="alpaca_en_demo", steps=3, results="rl_cpu.json"
    )
    parser.add_argument("--prompts-per-step", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=8, help="answers to each prompt")
    parser.add_argument("--answer-length", type=int, default=64, help="tokens of every answer")
    parser.add_argument("--prompt-words", type=int, default=120, help="words that a prompt has at most")
    return side_by_side.parse(parser, CONTENDERS)


def build_job(options: argparse.Namespace) -> dict[str, Any]:
    """What all workers are told."""
    count = options.steps * options.prompts_per_step
    rows = options.prompts_per_step * options.group_size
    return {
        **side_by_side.job_settings(options),
        "prompts": pairs.questions(options.data, options.dataset, count, options.prompt_words),
        "prompts_per_step": options.prompts_per_step,
        "group_size": options.group_size,
        "answer_length": options.answer_length,
        "rows_per_step": rows,
        "rows_per_pass": rows,
        "gradient_checkpointing": True,
    }


def rollout(line: dict[str, Any]) -> float:
    """Tokens of answers per second of sampling, rewards included."""
    warmup = len(line["tokens_of_steps"]) - line["timed_steps"]
    return float(line["tokens"] / sum(line["rollout_seconds"][warmup:]))


def update(line: dict[str, Any]) -> float:
    """Tokens of answers per second of what is not sampling."""
    warmup = len(line["tokens_of_steps"]) - line["timed_steps"]
    return float(line["tokens"] / (line["seconds"] - sum(line["rollout_seconds"][warmup:])))


MEASURES = {"rollout": rollout, "update": update, "step": speed, "peak": peak}


def summarised(rounds: list[Round], contenders: list[str]) -> dict[str, Any]:
    """Each measure of each contender, and Luthier's over the others'."""
    result: dict[str, Any] = {
        "contenders": {
            name: {key: over_rounds(rounds, name, of).as_dict() for key, of in MEASURES.items()}
            for name in contenders
        },
        "over": {
            mine: {
                other: {key: ratios(rounds, mine, other, of).as_dict() for key, of in MEASURES.items()}
                for other in contenders
                if not other.startswith("luthier")
            }
            for mine in contenders
            if mine.startswith("luthier")
        },
    }
    result["targets"] = judged(result, WANTED)
    return result


def show(result: dict[str, Any]) -> None:
    console = Console(width=150)
    table = Table("contender", "rollout tokens/s", "update tokens/s", "step tokens/s", "peak MiB")
    for name, entry in result["contenders"].items():
        table.add_row(name, *(cell(entry[key], 0) for key in MEASURES))
    console.print(table)
    table = Table("Luthier / other", *MEASURES, title="ratios within a round")
    for mine, others in result["over"].items():
        for other, entry in others.items():
            table.add_row(f"{mine} / {other}", *(cell(entry[key]) for key in MEASURES))
    console.print(table)
    for row in result["targets"]:
        verdict = "reached" if row["met"] else "not reached"
        console.print(f"{row['target']}: wanted {row['wanted']:.2f}, measured {row['got']:.2f}, {verdict}")


def main() -> None:
    options = parse()
    job = build_job(options)
    settings = {key: value for key, value in job.items() if key not in ("prompts", "model", "data")}
    rounds: list[Round] = []
    result: dict[str, Any] = {}
    one_group = {"rows_per_pass": options.group_size}
    contenders = {
        name: Contender(one.script, one.python, {**one.settings, **one_group})
        if one.settings.get("one_group")
        else one
        for name, one in CONTENDERS.items()
    }
    for measured in side_by_side.rounds_of(options, job, contenders, summary.speed):
        rounds.append(measured)
        result = {"settings": settings, **summarised(rounds, options.contenders), "rounds": rounds}
        side_by_side.write(result, options.results)
    show(result)


if __name__ == "__main__":
    main()
