"""How fast this machine multiplies matrices of the model's shapes, with the same number of threads."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch

Product = tuple[int, int, int, int]
"""Rows, inner size, columns, and how often the step needs this product."""


def flops_per_second(products: Iterable[Product], repeats: int = 5) -> float:
    """Float32 rate over all the products of a step, each at the best time of `repeats`."""
    flops = seconds = 0.0
    for rows, inner, columns, count in products:
        flops += 2.0 * rows * inner * columns * count
        seconds += count * _best_time(rows, inner, columns, repeats)
    return flops / seconds


def _best_time(rows: int, inner: int, columns: int, repeats: int) -> float:
    left, right = torch.randn(rows, inner), torch.randn(columns, inner).t()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - start)
    return best
