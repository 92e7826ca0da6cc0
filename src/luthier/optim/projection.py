"""Projections of a gradient onto few dimensions, for GaLore and APOLLO.

A projection is a dictionary of bases: `left` (m, r) has r columns and shortens the first side of an (m, n) gradient,
`right` (r, n) shortens the second.
"""

from __future__ import annotations

import torch
from torch import Tensor

Bases = dict[str, Tensor]


def sides(side: str, rows: int, columns: int) -> tuple[str, ...]:
    """Which bases a setting means for a matrix of this shape. `std` shortens the shorter side."""
    if side == "full":
        return ("left", "right")
    if side in ("left", "right"):
        return (side,)
    tall = rows >= columns
    return ("right",) if tall == (side == "std") else ("left",)


def svd_bases(grad: Tensor, rank: int, wanted: tuple[str, ...]) -> Bases:
    """The first `rank` singular vectors of each wanted side, in the gradient's type, computed in float32."""
    left, _, right = torch.linalg.svd(grad.float(), full_matrices=False)
    bases = {"left": left[:, :rank], "right": right[:rank]}
    return {name: bases[name].to(grad.dtype).contiguous() for name in wanted}


def random_bases(grad: Tensor, rank: int, wanted: tuple[str, ...], seed: int) -> Bases:
    """Gaussian entries of variance 1 / rank, a pure function of shape, device and seed."""
    rows, columns = grad.shape
    shapes = {"left": (rows, rank), "right": (rank, columns)}
    generator = torch.Generator(device=grad.device).manual_seed(seed)
    return {
        name: torch.randn(shapes[name], generator=generator, device=grad.device)
        .div_(rank**0.5)
        .to(grad.dtype)
        for name in wanted
    }


def down(grad: Tensor, bases: Bases) -> Tensor:
    if "left" in bases:
        grad = bases["left"].T @ grad
    return grad @ bases["right"].T if "right" in bases else grad


def up(low: Tensor, bases: Bases) -> Tensor:
    if "left" in bases:
        low = bases["left"] @ low
    return low @ bases["right"] if "right" in bases else low
