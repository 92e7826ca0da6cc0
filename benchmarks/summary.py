"""From the measured rounds to ratios, and from ratios to a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

Round = dict[str, dict[str, Any]]
"""One measured line per contender, with the matrix-product rate measured right after it."""

SAME_ROWS = ("luthier", "llamafactory", "trl", "trainer")
"""Contenders whose steps hold the same rows as the plain Trainer's."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Smallest, middle and largest value over the rounds."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        ordered = sorted(values)
        return cls(ordered[0], median(ordered), ordered[-1])

    def as_dict(self) -> dict[str, float]:
        return {"min": self.low, "median": self.middle, "max": self.high}


def speed(line: dict[str, Any]) -> float:
    """Real tokens per second of the timed steps."""
    return float(line["tokens"] / line["seconds"])


def thrift(line: dict[str, Any]) -> float:
    """Real tokens per second of processor time: steadier than `speed` on a machine that is shared."""
    return float(line["tokens"] / line["cpu_seconds"])


def peak(line: dict[str, Any]) -> float:
    """High-water mark of the resident set while training, MiB."""
    return float(line["peak_training_mib"])


def growth(line: dict[str, Any]) -> float:
    """What training added to the resident set that was there when it began, MiB."""
    return float(line["peak_training_mib"] - line["rss_before_mib"])


def over_rounds(rounds: Sequence[Round], name: str, value: Callable[[dict[str, Any]], float]) -> Spread:
    return Spread.of(value(one[name]) for one in rounds)


def ratios(
    rounds: Sequence[Round], top: str, bottom: str, value: Callable[[dict[str, Any]], float]
) -> Spread:
    """`value(top) / value(bottom)`, each quotient within one round."""
    return Spread.of(value(one[top]) / value(one[bottom]) for one in rounds)


def loss_difference(rounds: Sequence[Round], name: str) -> float:
    """Largest absolute difference between a step's loss and the plain Trainer's, over steps and rounds."""
    pairs = [
        (mine, reference)
        for one in rounds
        for mine, reference in zip(one[name]["losses"], one["trainer"]["losses"], strict=True)
    ]
    return max(abs(mine - reference) for mine, reference in pairs)


def floor_multiples(rounds: Sequence[Round], name: str, flops_per_token: float) -> Spread:
    """Step time divided by the time its matrix products need at the rate measured right after it."""
    return over_rounds(rounds, name, lambda line: line["flops_per_second"] / (flops_per_token * speed(line)))


def summarise(rounds: Sequence[Round], contenders: Sequence[str], flops_per_token: float) -> dict[str, Any]:
    """Everything that the table shows, as plain values."""
    result: dict[str, Any] = {"contenders": {}, "luthier_over": {}}
    for name in contenders:
        entry: dict[str, Any] = {
            "tokens_per_second": over_rounds(rounds, name, speed).as_dict(),
            "tokens_per_cpu_second": over_rounds(rounds, name, thrift).as_dict(),
            "peak_training_mib": over_rounds(rounds, name, peak).as_dict(),
            "growth_mib": over_rounds(rounds, name, growth).as_dict(),
            "multiple_of_floor": floor_multiples(rounds, name, flops_per_token).as_dict(),
        }
        if name in SAME_ROWS and "trainer" in contenders:
            entry["largest_loss_difference"] = loss_difference(rounds, name)
        result["contenders"][name] = entry
    if "luthier" in contenders:
        for name in contenders:
            if name != "luthier":
                result["luthier_over"][name] = {
                    "speed": ratios(rounds, "luthier", name, speed).as_dict(),
                    "thrift": ratios(rounds, "luthier", name, thrift).as_dict(),
                    "peak_memory": ratios(rounds, "luthier", name, peak).as_dict(),
                    "growth": ratios(rounds, "luthier", name, growth).as_dict(),
                }
    result["targets"] = judged(result, WANTED)
    return result


Wanted = tuple[str, float, bool, tuple[str, ...]]
"""A label, a value, whether it is a least one, and where in the result the spread is."""

WANTED: list[Wanted] = [
    ("speed over trl", 3.0, True, ("luthier_over", "trl", "speed")),
    ("speed over llamafactory", 3.0, True, ("luthier_over", "llamafactory", "speed")),
    ("speed over trl_packing", 2.0, True, ("luthier_over", "trl_packing", "speed")),
    ("peak memory over trl", 1 / 3, False, ("luthier_over", "trl", "peak_memory")),
    ("step over its matrix products", 2.0, False, ("contenders", "luthier", "multiple_of_floor")),
]


def judged(result: dict[str, Any], wanted: Iterable[Wanted]) -> list[dict[str, Any]]:
    """What the project wants to show, beside the median that was measured. Nothing here fails the run."""
    rows = []
    for label, value, at_least, path in wanted:
        node: Any = result
        for key in path:
            node = node.get(key) if node else None
        if node:
            got = node["median"]
            rows.append(
                {
                    "target": label,
                    "wanted": value,
                    "got": got,
                    "met": got >= value if at_least else got <= value,
                }
            )
    return rows


def cell(spread: dict[str, float] | None, digits: int = 2) -> str:
    if spread is None:
        return "-"
    return f"{spread['median']:.{digits}f} ({spread['min']:.{digits}f} to {spread['max']:.{digits}f})"


def show(result: dict[str, Any]) -> None:
    """Print the tables: median (min to max) over the rounds."""
    console = Console(width=150)
    table = Table(
        "contender",
        "tokens/s",
        "tokens/CPU s",
        "x floor",
        "peak MiB",
        "grown MiB",
        "loss difference",
        title="contenders",
    )
    for name, entry in result["contenders"].items():
        difference = entry.get("largest_loss_difference")
        table.add_row(
            name,
            cell(entry["tokens_per_second"], 0),
            cell(entry["tokens_per_cpu_second"], 0),
            cell(entry["multiple_of_floor"]),
            cell(entry["peak_training_mib"], 0),
            cell(entry["growth_mib"], 0),
            "-" if difference is None else f"{difference:.1e}",
        )
    console.print(table)
    if result["luthier_over"]:
        table = Table(
            "Luthier / other",
            "speed",
            "speed by CPU time",
            "peak memory",
            "grown memory",
            title="ratios within a round",
        )
        for name, entry in result["luthier_over"].items():
            table.add_row(
                name,
                cell(entry["speed"]),
                cell(entry["thrift"]),
                cell(entry["peak_memory"]),
                cell(entry["growth"]),
            )
        console.print(table)
    for row in result["targets"]:
        verdict = "reached" if row["met"] else "not reached"
        console.print(f"{row['target']}: wanted {row['wanted']:.2f}, measured {row['got']:.2f}, {verdict}")
