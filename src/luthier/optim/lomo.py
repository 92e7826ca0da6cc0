"""LOMO (Lv et al., 2023, arXiv:2306.09782) and AdaLomo (Lv et al., 2023, arXiv:2310.10195).

Both update a parameter in the backward pass, as soon as its gradient is there, and free the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luthier.optim.parameterwise import ParameterWise


class Lomo(ParameterWise):
    """Gradient descent. Groups have lr, weight_decay and clip_value, the largest absolute entry of a gradient, or None.
    No state."""

    def update(self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if group["clip_value"] is not None:
            grad = grad.clamp(-group["clip_value"], group["clip_value"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(grad, alpha=-group["lr"])


class AdaLomo(ParameterWise):
    """Adafactor's factored second moments; an update has at most the root mean square `clip_threshold`, times that of
    its parameter. Groups have lr, weight_decay, eps, clip_threshold and decay_rate. State, in float32: `row` (..., m)
    and `column` (..., n) of a matrix (..., m, n), `exp_avg_sq` of a vector.

    Second moments decay by 1 - t^decay_rate at step t.
    """

    def update(self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        grad = grad.float()
        state["step"] = state.get("step", 0) + 1
        keep = 1 - state["step"] ** group["decay_rate"]
        squares = grad.square().add_(group["eps"][0])
        if grad.ndim > 1:
            row = _average(state, "row", squares.mean(dim=-1), keep)
            column = _average(state, "column", squares.mean(dim=-2), keep)
            shares = row / row.mean(dim=-1, keepdim=True)
            update = grad * (shares.rsqrt().unsqueeze(-1) * column.rsqrt().unsqueeze(-2))
        else:
            update = grad * _average(state, "exp_avg_sq", squares, keep).rsqrt()
        update.div_((_rms(update) / group["clip_threshold"]).clamp_(min=1.0))
        value = parameter.float()
        lr = group["lr"] * _rms(value).clamp(min=group["eps"][1])
        parameter.copy_(value * (1 - lr * group["weight_decay"]) - lr * update)


def _average(state: dict[str, Any], name: str, value: Tensor, keep: float) -> Tensor:
    if name not in state:
        state[name] = torch.zeros_like(value)
    average: Tensor = state[name].mul_(keep).add_(value, alpha=1 - keep)
    return average


def _rms(value: Tensor) -> Tensor:
    size: Tensor = value.norm() / value.numel() ** 0.5
    return size
