"""Intervals of resampled rows against those that statistics knows in closed form."""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np
import pytest

from luthier.measures.intervals import (
    Statistic,
    ends,
    intervals,
    paired,
    ratio,
    ratio_difference,
    share_difference,
    wilson,
)

Array = np.ndarray[Any, Any]


def mean_of(values: Array) -> Statistic:
    return lambda counts: {"mean": float(counts @ values / counts.sum())}


def test_a_large_bernoulli_sample_has_the_normal_interval() -> None:
    values = (np.arange(4000) % 10 < 3).astype(float)
    found = intervals(mean_of(values), len(values), draws=4000)["mean"]
    half = 1.959964 * sqrt(0.3 * 0.7 / len(values))
    assert found.value == pytest.approx(0.3)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.06)
    assert (found.low, found.high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.1 * half)


def test_a_narrower_level_is_a_narrower_interval() -> None:
    values = np.random.default_rng(1).normal(size=3000)
    found = intervals(mean_of(values), len(values), draws=4000, level=0.6827)["mean"]
    assert found.high - found.low == pytest.approx(2 * values.std() / sqrt(3000), rel=0.08)


def test_the_paired_difference_has_the_interval_of_the_differences() -> None:
    """Rows are hard or easy for both; only what differs between the two counts."""
    rng = np.random.default_rng(2)
    hard, gain = rng.normal(0, 10, 2000), rng.normal(0.5, 1, 2000)
    found = paired(mean_of(hard + gain), mean_of(hard), 2000, draws=4000)["mean"]
    half = 1.959964 * gain.std() / sqrt(2000)
    assert found.value == pytest.approx(gain.mean())
    assert found.high - found.low == pytest.approx(2 * half, rel=0.08)
    assert found.low > 0  # the intervals of each alone, ten times wider, overlap


def test_the_same_seed_draws_the_same_rows() -> None:
    values = np.random.default_rng(3).normal(size=50)
    first, again, other = (intervals(mean_of(values), 50, draws=200, seed=seed)["mean"] for seed in (1, 1, 2))
    assert first == again
    assert first.low != other.low


def test_one_row_is_its_own_interval_and_none_is_refused() -> None:
    only = intervals(mean_of(np.array([7.0])), 1, draws=10)["mean"]
    assert (only.value, only.low, only.high) == (7, 7, 7)
    with pytest.raises(ValueError, match="no rows"):
        intervals(mean_of(np.array([])), 0)


def test_wilson_is_the_published_interval() -> None:
    """Values of Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for (right, num), expected in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        assert ends(wilson(right, num)) == pytest.approx(expected, abs=5e-5)
    assert wilson(0, 0) is None


def test_bootstraps_against_their_closed_forms() -> None:
    """Means of many rows: the normal interval. Ratios that are the same in every row: a point."""
    values = np.random.default_rng(3).normal(2.0, 1.5, 4000).tolist()
    half = 1.96 * float(np.std(values)) / sqrt(len(values))
    found = ends(ratio(values, [1.0] * len(values)))
    assert found == pytest.approx((np.mean(values) - half, np.mean(values) + half), abs=0.1 * half)
    assert ends(ratio([2.0, 4.0, 8.0], [1.0, 2.0, 4.0])) == pytest.approx((2.0, 2.0))
    assert ratio([1.0], [1.0]) is None
    assert ratio([1.0, 2.0], [0.0, 0.0]) is None
    # Paired: what both rows share cancels, however far the rows are apart.
    shifted = [value + 0.5 for value in values]
    assert ends(ratio_difference((shifted, values), ([1.0] * 4000,) * 2)) == pytest.approx((0.5, 0.5))
    first, second = [True] * 60 + [False] * 40, [True] * 50 + [False] * 50
    low, high = ends(share_difference(first, second)) or (0, 0)
    spread = 1.96 * sqrt(0.1 * 0.9 / 100)
    assert (low, high) == pytest.approx((0.1 - spread, 0.1 + spread), abs=0.02)
