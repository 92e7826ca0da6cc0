"""What saves memory changes nothing: layers computed again, and activations that waited in host memory.

Kernels of a GPU may add in another order from call to call, so the bound is a rounding error and not a bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from gpu_equalities import FP32_GRADIENT, FP32_LOSS, LEAST_LOSS, Check, Comparison, judge, relative
from torch import Tensor, nn

from luthier.model import offload
from luthier.model.checkpointing import checkpoint_layers
from luthier.model.offload import offload_activations
from luthier.recipe.schema import CheckpointingSpec

BF16_GRADIENT = 1e-2
WAYS = {
    "checkpointing = none": (CheckpointingSpec(), False),
    "reentrant checkpointing = none": (CheckpointingSpec(reentrant=True), False),
    "activation offload = none": (None, True),
    "checkpointing with offload = none": (CheckpointingSpec(), True),
}


def memory_tricks(comparison: Comparison, precision: str) -> Iterator[Check]:
    """Each against the plain pass; `moved_bytes` counts what the offload handed to the host."""
    reference = comparison.flat(comparison.model(precision), precision, [comparison.batch])
    exact = precision == "fp32"
    bounds = {"loss": FP32_LOSS, "gradient": FP32_GRADIENT}
    if not exact:
        bounds = {"loss": LEAST_LOSS, "gradient": BF16_GRADIENT}
    for name, (spec, moves) in WAYS.items():
        model: Any = comparison.model(precision)
        if spec is not None:
            checkpoint_layers(model, spec)
        if moves:
            offload_activations(model)
        moved: list[int] = []
        found = _counted(comparison, model, precision, moved)
        values = {**relative(found, reference), "moved_bytes": float(sum(moved))}
        yield judge(name, precision, values, bounds)
        del model
        comparison.machine.release()


def _counted(comparison: Comparison, model: nn.Module, precision: str, moved: list[int]) -> Any:
    to_host = offload.to_host

    def counting(tensor: Tensor) -> Tensor:
        host = to_host(tensor)
        assert host.device == torch.device("cpu")
        moved.append(host.numel() * host.element_size())
        return host

    offload.to_host = counting
    try:
        return comparison.flat(model, precision, [comparison.batch])
    finally:
        offload.to_host = to_host
