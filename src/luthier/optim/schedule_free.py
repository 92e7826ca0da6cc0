"""Schedule-free AdamW (Defazio et al., 2024, arXiv:2405.15682, algorithm 1).

Three points: z takes the steps, x is the weighted average of z, gradients are taken at y = (1 - beta1) z + beta1 x.
While it trains, the parameters are y; x is what is worth evaluating and saving. As the authors' package, and unlike the
paper's algorithm, Adam's bias correction stands in the denominator and not in the weights of the average.
"""

from __future__ import annotations

from typing import Any

import torch

from luthier.optim.parameterwise import ExactState, Groups


class ScheduleFreeAdamW(ExactState):
    """Groups have lr, weight_decay, betas, eps, r and weight_lr_power. State: z and `exp_avg_sq`, and y between
    `eval` and `train`, which puts it back bit by bit: evaluations and checkpoints change no later step."""

    def __init__(self, groups: Groups, defaults: dict[str, Any]) -> None:
        super().__init__(
            groups, {**defaults, "num_steps": 0, "weight_sum": 0.0, "lr_max": 0.0, "averaged": False}
        )

    @torch.no_grad()
    def eval(self) -> None:
        """Make the parameters the average x."""
        for group in self.param_groups:
            for parameter in () if group["averaged"] else group["params"]:
                if "z" in (state := self.state[parameter]):
                    state["y"] = parameter.clone()
                    parameter.lerp_(state["z"], 1 - 1 / group["betas"][0])
            group["averaged"] = True

    @torch.no_grad()
    def train(self) -> None:
        """Make the parameters y, where gradients are taken."""
        for group in self.param_groups:
            for parameter in group["params"] if group["averaged"] else ():
                if "y" in (state := self.state[parameter]):
                    parameter.copy_(state.pop("y"))
            group["averaged"] = False

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.train()
        for group in self.param_groups:
            group["num_steps"] += 1
            lr, (beta1, beta2), number = group["lr"], group["betas"], group["num_steps"]
            group["lr_max"] = max(group["lr_max"], lr)
            weight = number ** group["r"] * group["lr_max"] ** group["weight_lr_power"]
            group["weight_sum"] += weight
            share = weight / group["weight_sum"] if group["weight_sum"] else 0.0
            for y in group["params"]:
                if y.grad is None:
                    continue
                state = self.state[y]
                if "z" not in state:
                    state |= {"z": y.clone(), "exp_avg_sq": torch.zeros_like(y)}
                z, second = state["z"], state["exp_avg_sq"]
                second.mul_(beta2).addcmul_(y.grad, y.grad, value=1 - beta2)
                update = y.grad / (second / (1 - beta2**number)).sqrt_().add_(group["eps"])
                update.add_(y, alpha=group["weight_decay"])
                # y follows x and z without x being kept: x' = (1 - c) x + c z', y' = (1 - beta1) z' + beta1 x'.
                y.lerp_(z, share).add_(update, alpha=lr * (beta1 * (1 - share) - 1))
                z.sub_(update, alpha=lr)
