"""Normalisation in float32 where the rest of a model is 16-bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)


class _Float32Norm(nn.Module):
    """Mixed into the class of a normalisation layer: it computes in float32 and answers in the type it had.

    Not in its input's type: Mamba casts what it normalises to the type of the weights.
    """

    luthier_dtype: torch.dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(
            *(_raised(value) for value in args), **{name: _raised(value) for name, value in kwargs.items()}
        )
        return output.to(self.luthier_dtype)


def _raised(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value


def upcast_norms(model: nn.Module) -> int:
    """Give every normalisation layer with 16-bit weights float32 ones; returns how many there were.

    A layer is one whose class is named so (`LlamaRMSNorm`, `LayerNorm`, `Zamba2RMSNormGated`) and whose weights are
    its own. The rest of the model sees no other type than before.
    """
    layers = [
        module
        for module in model.modules()
        if type(module).__name__.removesuffix("Gated").endswith("Norm")
        and any(parameter.dtype in HALF for parameter in module.parameters(recurse=False))
    ]
    for module in layers:
        module.luthier_dtype = next(p.dtype for p in module.parameters(recurse=False) if p.dtype in HALF)  # type: ignore[assignment]
        module.float()
        cls = type(module)
        module.__class__ = type(cls.__name__, (_Float32Norm, cls), {"__module__": cls.__module__})
    return len(layers)
