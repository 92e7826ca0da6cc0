"""Several optimizers that look like one: schedules, clipping, checkpoints and loss scaling see a single object."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer


class Combined(Optimizer):
    """Inner optimizers over disjoint parameters. Their groups are its groups, the same dictionaries; states stay with
    the inner ones, and `state_dict` is `{"inner": [state_dict, ...]}`."""

    def __init__(self, inner: list[Optimizer], defaults: dict[str, Any]) -> None:
        self.inner = inner
        super().__init__([group for optimizer in inner for group in optimizer.param_groups], dict(defaults))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for optimizer in self.inner:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"inner": [optimizer.state_dict() for optimizer in self.inner]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, state in zip(self.inner, state_dict["inner"], strict=True):
            optimizer.load_state_dict(state)
        # Loading replaces an optimizer's groups.
        self.param_groups = [group for optimizer in self.inner for group in optimizer.param_groups]
