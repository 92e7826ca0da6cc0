"""Lion (Chen et al., 2023, arXiv:2302.06675, algorithm 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luthier.optim.parameterwise import ParameterWise


class Lion(ParameterWise):
    """The sign of a momentum that is looked at before it is updated; weight decay apart from it, as AdamW's.

    Groups have lr, weight_decay and betas. State: one momentum, `exp_avg`, of the parameter's shape and type.
    """

    def update(self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(parameter)
        beta1, beta2 = group["betas"]
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(state["exp_avg"].lerp(grad, 1 - beta1).sign_(), alpha=-group["lr"])
        state["exp_avg"].lerp_(grad, 1 - beta2)
