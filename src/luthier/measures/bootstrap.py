"""How sure a number of N rows is: percentile intervals of resampled rows (Efron, 1979), paired where two are compared.

intervals(statistic, num_rows)          -> value and interval of every number
paired(statistic, other, num_rows)      -> the same of the differences, each resample taken of both
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.95
DRAWS = 1000
SEED = 42

Statistic = Callable[[np.ndarray[Any, Any]], Mapping[str, float]]
"""Numbers by name of rows that count as often as an (N,) array says."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A number of the rows as they are, and where it lies in `LEVEL` of the resamples."""

    value: float
    low: float
    high: float

    def to_list(self) -> list[float]:
        return [round(self.low, 4), round(self.high, 4)]


def intervals(
    statistic: Statistic, num_rows: int, *, draws: int = DRAWS, seed: int = SEED, level: float = LEVEL
) -> dict[str, Interval]:
    """Resamples of N rows, with repetition: the same ones for the same seed and N.

    Raises ValueError where there are no rows.
    """
    if num_rows < 1:
        raise ValueError("no rows: there is nothing to resample")
    rng = np.random.default_rng(seed)
    values = statistic(np.ones(num_rows))
    drawn: dict[str, list[float]] = {name: [] for name in values}
    for _ in range(draws):
        counts_N = np.bincount(rng.integers(0, num_rows, num_rows), minlength=num_rows)
        for name, value in statistic(counts_N).items():
            drawn[name].append(value)
    tails = [(1 - level) / 2, (1 + level) / 2]
    return {
        name: Interval(value, *(float(bound) for bound in np.quantile(drawn[name], tails)))
        for name, value in values.items()
    }


def paired(
    statistic: Statistic,
    other: Statistic,
    num_rows: int,
    *,
    draws: int = DRAWS,
    seed: int = SEED,
    level: float = LEVEL,
) -> dict[str, Interval]:
    """`statistic` less `other` on the same rows. What makes a row hard for both leaves no trace in the difference."""

    def difference(counts_N: np.ndarray[Any, Any]) -> dict[str, float]:
        second = other(counts_N)
        return {name: value - second[name] for name, value in statistic(counts_N).items()}

    return intervals(difference, num_rows, draws=draws, seed=seed, level=level)
