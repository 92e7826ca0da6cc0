"""How sure a number of N rows is: intervals of 95 %.

intervals(statistic, num_rows)          -> value and interval of every number, from resampled rows
paired(statistic, other, num_rows)      -> the same of the differences, each resample taken of both
ratio(totals, weights)                  -> of a mean over tokens: sum(totals) / sum(weights)
ratio_difference, share_difference      -> of two models on the same rows
wilson(successes, num)                  -> of a share, in closed form

Resampled are whole rows, with repetition; the interval is that of percentiles (Efron, 1979,
doi:10.1214/aos/1176344552).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.95
DRAWS = 1000
SEED = 42
_Z = 1.959963984540054
"""The 97.5 % point of the normal distribution."""

Statistic = Callable[[np.ndarray[Any, Any]], Mapping[str, float]]
"""Numbers by name of rows that count as often as an (N,) array says."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A number of the rows as they are, and where it lies in `LEVEL` of the resamples, or of the samples there are."""

    value: float
    low: float
    high: float

    @property
    def ends(self) -> tuple[float, float]:
        return self.low, self.high

    def to_list(self) -> list[float]:
        return [round(self.low, 4), round(self.high, 4)]


def intervals(
    statistic: Statistic, num_rows: int, *, draws: int = DRAWS, seed: int = SEED, level: float = LEVEL
) -> dict[str, Interval]:
    """Resamples of N rows, with repetition: the same ones for the same seed and N.

    A resample on which a number is not finite says nothing of it; both ends are NaN where none does. Raises ValueError
    where there are no rows.
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
    return {name: _percentiles(value, drawn[name], level) for name, value in values.items()}


def _percentiles(value: float, drawn: Sequence[float], level: float) -> Interval:
    finite = [number for number in drawn if math.isfinite(number)]
    if not finite:
        return Interval(value, math.nan, math.nan)
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


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


def ratio(totals: Sequence[float], weights: Sequence[float]) -> Interval | None:
    """Of sum(totals) / sum(weights), one of each for a row; None of fewer than two rows, and of rows without weight."""
    return _known(intervals(_ratio(totals, weights), len(totals))) if len(totals) > 1 else None


def ratio_difference(
    totals: tuple[Sequence[float], Sequence[float]], weights: tuple[Sequence[float], Sequence[float]]
) -> Interval | None:
    """Of the first ratio less the second, the same rows drawn for both; None as of `ratio`."""
    num_rows = len(totals[0])
    if num_rows < 2:
        return None
    return _known(paired(_ratio(totals[0], weights[0]), _ratio(totals[1], weights[1]), num_rows))


def share_difference(first: Sequence[float], second: Sequence[float]) -> Interval | None:
    """Of the mean of the first less that of the second, over the same rows; None of fewer than two."""
    ones = [1.0] * len(first)
    return ratio_difference((first, second), (ones, ones))


def wilson(successes: float, num: int) -> Interval | None:
    """Of a share (Wilson, 1927, doi:10.1080/01621459.1927.10502953); None of nothing."""
    if not num:
        return None
    share, square = successes / num, _Z * _Z / num
    centre = (share + square / 2) / (1 + square)
    half = _Z / (1 + square) * math.sqrt(share * (1 - share) / num + square / (4 * num))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def ends(interval: Interval | None) -> tuple[float, float] | None:
    """Low and high, where there is an interval."""
    return None if interval is None else interval.ends


def _ratio(totals: Sequence[float], weights: Sequence[float]) -> Statistic:
    totals_N, weights_N = np.array(totals, np.float64), np.array(weights, np.float64)

    def statistic(counts_N: np.ndarray[Any, Any]) -> dict[str, float]:
        weight = float(weights_N @ counts_N)
        return {"ratio": float(totals_N @ counts_N) / weight if weight else math.nan}

    return statistic


def _known(found: Mapping[str, Interval]) -> Interval | None:
    one = found["ratio"]
    return None if math.isnan(one.low) else one
