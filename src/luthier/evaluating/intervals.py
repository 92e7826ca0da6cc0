"""Intervals of 95 %: of a share, of a mean over tokens, and of the difference between two models on the same rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
Interval = tuple[float, float]

Z = 1.959963984540054
"""The 97.5 % point of the normal distribution."""
RESAMPLES = 2000
_SEED = 0
_AT_ONCE = 1 << 22


def wilson(successes: float, num: int) -> Interval | None:
    """The interval of a share (Wilson, 1927, doi:10.1080/01621459.1927.10502953); None of nothing."""
    if not num:
        return None
    share, square = successes / num, Z * Z / num
    centre = (share + square / 2) / (1 + square)
    half = Z / (1 + square) * math.sqrt(share * (1 - share) / num + square / (4 * num))
    return max(0.0, centre - half), min(1.0, centre + half)


def ratio(totals: Sequence[float], weights: Sequence[float]) -> Interval | None:
    """The interval of sum(totals) / sum(weights), rows drawn with repetition; None of fewer than two rows.

    Percentiles of the bootstrap (Efron, 1979, doi:10.1214/aos/1176344552), from a fixed seed.
    """
    return _percentiles(np.array([totals], np.float64), np.array([weights], np.float64))


def ratio_difference(
    totals: tuple[Sequence[float], Sequence[float]], weights: tuple[Sequence[float], Sequence[float]]
) -> Interval | None:
    """The interval of the first ratio less the second, the same rows drawn for both (a paired bootstrap)."""
    return _percentiles(np.array(totals, np.float64), np.array(weights, np.float64))


def share_difference(first: Sequence[bool], second: Sequence[bool]) -> Interval | None:
    """The interval of the share of the first less that of the second, over the same rows."""
    ones = [1.0] * len(first)
    return ratio_difference(([float(x) for x in first], [float(x) for x in second]), (ones, ones))


def _percentiles(totals: Array, weights: Array) -> Interval | None:
    """totals and weights (M, n) of one model, or of two that are subtracted."""
    num = totals.shape[1]
    if num < 2:
        return None
    rng, found, step = np.random.default_rng(_SEED), [], max(1, _AT_ONCE // num)
    for start in range(0, RESAMPLES, step):
        drawn = rng.integers(0, num, (min(step, RESAMPLES - start), num))
        with np.errstate(divide="ignore", invalid="ignore"):  # a draw without weight says nothing
            ratios = totals[:, drawn].sum(-1) / weights[:, drawn].sum(-1)
        found.append(ratios[0] - ratios[1] if len(ratios) == 2 else ratios[0])
    every = np.concatenate(found)
    every = every[np.isfinite(every)]
    if not len(every):
        return None
    low, high = np.quantile(every, (0.025, 0.975))
    return float(low), float(high)
