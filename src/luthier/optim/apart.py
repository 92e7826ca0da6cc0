"""One optimizer over parameters that are parts of matrices (`DTensor`) and others that each process holds whole.

A fused step of torch's takes either kind. Its groups are cut for the length of a step, so that its state, and what is
saved of it, are those of a single process.
"""

from __future__ import annotations

from typing import Any

from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


def step_apart(optimizer: Optimizer) -> None:
    """Let each step take parts first and whole parameters then; an optimizer with one kind stays as it is."""
    kinds = {
        isinstance(parameter, DTensor) for group in optimizer.param_groups for parameter in group["params"]
    }
    if len(kinds) < 2:
        return
    whole: list[list[dict[str, Any]]] = []

    def cut(one: Optimizer, args: Any, kwargs: Any) -> None:
        whole.append(one.param_groups)
        one.param_groups = [
            {**group, "params": parameters}
            for group in one.param_groups
            for kind in (True, False)
            if (parameters := [p for p in group["params"] if isinstance(p, DTensor) is kind])
        ]

    def join(one: Optimizer, args: Any, kwargs: Any) -> None:
        one.param_groups = whole.pop()

    optimizer.register_step_pre_hook(cut)
    optimizer.register_step_post_hook(join)
