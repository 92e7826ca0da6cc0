"""What the optimizers of this package share: states load as they were saved, and parameters are updated one by one."""

from __future__ import annotations

from abc import abstractmethod
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Groups = list[dict[str, Any]]
"""Parameter groups: `params`, `weight_decay` and, where it is not the recipe's, `lr`."""


class ExactState(Optimizer):
    """An optimizer whose states keep their types when they are loaded; torch casts them to the parameter's."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in state_dict["state"]:
                self.state[parameter] = {
                    key: value.to(parameter.device, copy=True) if isinstance(value, Tensor) else value
                    for key, value in state_dict["state"][number].items()
                }


class ParameterWise(ExactState):
    """An optimizer whose update of a parameter needs nothing but that parameter, its gradient and its states."""

    def __init__(self, groups: Groups, defaults: dict[str, Any], *, in_backward: bool = False) -> None:
        """in_backward: update each parameter in the backward pass, once its gradient is whole, and free the gradient.
        `step` then finds nothing left to do. A step of several backward passes would be several updates."""
        super().__init__(groups, defaults)
        self._group_of = {
            id(parameter): index
            for index, group in enumerate(self.param_groups)
            for parameter in group["params"]
        }
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._take)
            for group in self.param_groups
            for parameter in group["params"]
            if in_backward
        ]

    @abstractmethod
    def update(self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Change `parameter` and `state` in place; called without autograd."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, parameter.grad, self.state[parameter], group)

    @torch.no_grad()
    def _take(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        # Loading a state replaces the groups, so they are looked up by number.
        group = self.param_groups[self._group_of[id(parameter)]]
        self.update(parameter, parameter.grad, self.state[parameter], group)
        parameter.grad = None

    def release(self) -> None:
        """Take the hooks off the parameters; another optimizer may come."""
        for hook in self._hooks:
            hook.remove()


def adam_direction(state: dict[str, Any], grad: Tensor, betas: tuple[float, float], eps: float) -> Tensor:
    """Adam's direction m / (sqrt(v) + eps), both moments bias-corrected, of the shape of `grad` (Kingma & Ba, 2014,
    arXiv:1412.6980, algorithm 1). Updates `step`, `exp_avg` and `exp_avg_sq` of `state` in place."""
    if "exp_avg" not in state:
        state |= {"step": 0, "exp_avg": torch.zeros_like(grad), "exp_avg_sq": torch.zeros_like(grad)}
    state["step"] += 1
    beta1, beta2 = betas
    state["exp_avg"].lerp_(grad, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt_()
    direction: Tensor = state["exp_avg"].div(root.add_(eps)).div_(1 - beta1 ** state["step"])
    return direction
