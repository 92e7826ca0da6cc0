"""From measured rounds of a preference benchmark to ratios and a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import pairs
from rich.console import Console
from rich.table import Table
from summary import Round, cell, judged, over_rounds, peak, ratios, speed, thrift

SAME_LOSS = 1e-4
"""Largest difference between two contenders' losses of a step."""
SAME_LOGPROBS = 1e-4
"""Largest relative difference between two contenders' log-probabilities of a step's answers."""

WANTED = [
    (f"{label} of {mine} over {other}", value, at_least, ("over", mine, other, key))
    for other in ("trl", "trl_accumulated")
    for mine in ("luthier", "luthier_unshared", "luthier_cached")
    for label, key, value, at_least in (("speed", "speed", 3.0, True), ("peak memory", "peak", 1 / 3, False))
]


def process_peak(line: dict[str, Any]) -> float:
    """High-water mark of the resident set from the start of the process to the last step, MiB."""
    return float(max(line["peak_before_mib"], line["peak_training_mib"]))


def step_seconds(line: dict[str, Any]) -> float:
    """Seconds of a timed step."""
    return float(line["seconds"] / line["timed_steps"])


def precompute_seconds(line: dict[str, Any]) -> float:
    """Seconds of the reference's log-probabilities before training, for the pairs of one step; 0 without them."""
    return float(line["seconds_of"].get("precompute", 0.0) / len(line["tokens_of_steps"]))


def sizes(rows: Sequence[pairs.Pair]) -> dict[str, int]:
    """How many pairs, and their tokens."""
    return {
        "count": len(rows),
        "prompt_tokens": sum(len(row["prompt_ids"]) for row in rows),
        "answer_tokens": sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows),
    }


def same_losses(rounds: Sequence[Round], contenders: Sequence[str]) -> dict[str, Any]:
    """How far the contenders' losses and log-probabilities are apart, step by step, over all rounds.

    `initial_weights`: whether all began with the same adapter, bit by bit. `agreement` says what was asked for.
    """
    lines = [one[name] for one in rounds for name in contenders]
    losses = _spread([line["losses"] for line in lines])
    logged = [list(chain(*line["answer_logprobs"])) for line in lines if line["answer_logprobs"]]
    logprobs = _spread(logged, relative=True) if logged else 0.0
    first = max(abs(line["losses"][0] - math.log(2)) for line in lines)
    same_start = len({line["initial_weights"] for line in lines}) == 1
    return {
        "same_initial_weights": same_start,
        "first_loss_from_log_2": first,
        "largest_loss_difference": losses,
        "largest_relative_logprob_difference": logprobs,
        "agree": same_start and max(first, losses) <= SAME_LOSS and logprobs <= SAME_LOGPROBS,
    }


def _spread(rows: Sequence[Sequence[float]], *, relative: bool = False) -> float:
    """The largest difference between two rows at one place; by the larger magnitude there, if `relative`."""
    return max(
        (max(place) - min(place)) / (max(map(abs, place)) if relative else 1.0)
        for place in zip(*rows, strict=True)
    )


def summarise(rounds: Sequence[Round], contenders: Sequence[str]) -> dict[str, Any]:
    """Everything that the tables show, as plain values."""
    values = {
        "tokens_per_second": speed,
        "tokens_per_cpu_second": thrift,
        "step_seconds": step_seconds,
        "precompute_seconds_per_step": precompute_seconds,
        "peak_training_mib": peak,
        "peak_process_mib": process_peak,
    }
    measured = {
        name: {key: over_rounds(rounds, name, value).as_dict() for key, value in values.items()}
        for name in contenders
    }
    over: dict[str, Any] = {}
    quotients = {"speed": speed, "thrift": thrift, "peak": process_peak, "peak_training": peak}
    for mine in contenders:
        if not mine.startswith("luthier"):
            continue
        over[mine] = {
            other: {key: ratios(rounds, mine, other, value).as_dict() for key, value in quotients.items()}
            for other in contenders
            if other != mine
        }
    result = {"contenders": measured, "over": over, "losses": same_losses(rounds, contenders)}
    return {**result, "targets": judged(result, WANTED)}


def show(result: dict[str, Any]) -> None:
    """Print the tables: median (min to max) over the rounds."""
    console = Console(width=150)
    head = (
        "answer tokens/s",
        "by CPU time",
        "s/step",
        "+ s before, per step",
        "peak MiB",
        "peak in training",
    )
    table = Table("contender", *head, title="contenders")
    for name, entry in result["contenders"].items():
        table.add_row(
            name,
            cell(entry["tokens_per_second"], 0),
            cell(entry["tokens_per_cpu_second"], 0),
            cell(entry["step_seconds"], 1),
            cell(entry["precompute_seconds_per_step"], 1),
            cell(entry["peak_process_mib"], 0),
            cell(entry["peak_training_mib"], 0),
        )
    console.print(table)
    for mine, others in result["over"].items():
        head = ("speed", "speed by CPU time", "peak memory", "peak in training")
        table = Table(f"{mine} / other", *head, title="ratios within a round")
        for other, entry in others.items():
            table.add_row(other, *(cell(entry[key]) for key in ("speed", "thrift", "peak", "peak_training")))
        console.print(table)
    losses = result["losses"]
    console.print(
        f"losses of all contenders {'agree' if losses['agree'] else 'DO NOT AGREE'}: "
        f"first {losses['first_loss_from_log_2']:.1e} from log 2, largest difference "
        f"{losses['largest_loss_difference']:.1e}, of answers' log-probabilities "
        f"{losses['largest_relative_logprob_difference']:.1e} (relative); initial adapters "
        f"{'identical' if losses['same_initial_weights'] else 'DIFFERENT'}"
    )
    for row in result["targets"]:
        verdict = "reached" if row["met"] else "not reached"
        console.print(f"{row['target']}: wanted {row['wanted']:.2f}, measured {row['got']:.2f}, {verdict}")
