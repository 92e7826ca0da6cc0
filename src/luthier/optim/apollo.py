"""APOLLO (Zhu et al., 2024, arXiv:2412.05270, algorithm 1): gradients scaled as Adam scales a projection of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from luthier.optim.parameterwise import Groups, ParameterWise, adam_direction
from luthier.optim.projection import Bases, down, random_bases, sides, svd_bases

GROWTH = 1.01
"""The norm of an update may grow by this factor from step to step (Chen et al., 2024, arXiv:2410.01623)."""
_SEEDS_APART = 1_000_003


class Apollo(ParameterWise):
    """Groups have lr, weight_decay, betas, eps and rank; where rank is not 0, also update_every, scale, side,
    projection, scale_type, scale_front and seed.

    Rank 0 is AdamW. State: moments of the projected gradient, the norm of the last update, and with `svd` the bases.
    Random bases are drawn anew in each step from the seed, the parameter's number and that of the projection.
    """

    def __init__(self, groups: Groups, defaults: dict[str, Any], *, in_backward: bool = False) -> None:
        super().__init__(groups, defaults, in_backward=in_backward)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self._number = {id(parameter): number for number, parameter in enumerate(parameters)}

    def update(self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if group["rank"]:
            direction = self._scaled(grad, self._bases(parameter, grad, state, group), state, group)
        else:
            direction = adam_direction(state, grad, group["betas"], group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(direction, alpha=-group["lr"])

    def _bases(self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Bases:
        wanted, rank = sides(group["side"], *grad.shape), group["rank"]
        turn, since = divmod(state.get("step", 0), group["update_every"])
        if group["projection"] == "random":
            seed = group["seed"] + _SEEDS_APART * (self._number[id(parameter)] + _SEEDS_APART * turn)
            return random_bases(grad, rank, wanted, seed)
        if since == 0:
            state |= svd_bases(grad, rank, wanted)
        return {name: state[name] for name in wanted}

    def _scaled(self, grad: Tensor, bases: Bases, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        low = down(grad, bases)
        direction = adam_direction(state, low, group["betas"], group["eps"])
        beta1, beta2 = group["betas"]
        # The authors limit the growth of the norm before the bias correction, which is part of their step size.
        correction = (1 - beta2 ** state["step"]) ** 0.5 / (1 - beta1 ** state["step"])
        if group["scale_type"] == "channel":
            # Channels are those of the longer side; the shorter one was projected.
            axis = 0 if grad.shape[0] < grad.shape[1] else 1
            factor = direction.norm(dim=axis, keepdim=True) / (low.norm(dim=axis, keepdim=True) + 1e-8)
        else:
            factor = direction.norm() / (low.norm() + 1e-8)
        root = group["scale"] ** 0.5
        update = grad * (factor / correction)
        if group["scale_front"]:
            update = update * root
        norm = update.norm()
        if "norm" in state:
            shrink = (norm / (state["norm"] + 1e-8)).clamp_(min=GROWTH).div_(GROWTH)
            update, norm = update / shrink, norm / shrink
        state["norm"] = norm
        scaled: Tensor = update * (correction if group["scale_front"] else correction * root)
        return scaled
