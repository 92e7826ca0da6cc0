"""How fast this machine multiplies matrices of the model's shapes, with the same number of threads."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

Shape = tuple[int, int, int, int]


def seconds_of(rows: int, inner: int, columns: int, repeats: int) -> float:
    """Best time of one (rows, inner) x (inner, columns) float32 product."""
    left, right = torch.randn(rows, inner), torch.randn(columns, inner).t()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    flops = seconds = 0.0
    shapes: list[Shape] = [tuple(shape) for shape in job["products"]]
    for rows, inner, columns, count in shapes:
        once = seconds_of(rows, inner, columns, job["gemm_repeats"])
        flops += 2.0 * rows * inner * columns * count
        seconds += once * count
    print("\n" + json.dumps({"contender": "gemm", "flops_per_second": flops / seconds}), flush=True)


if __name__ == "__main__":
    main()
