"""Float32 where the rest of a model is 16-bit: normalisation, and the weights that train."""

from __future__ import annotations

import json
from pathlib import Path
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


def upcast_trained(model: nn.Module) -> int:
    """Give every 16-bit parameter that trains a float32 value; returns how many there were.

    Autocast is what brings the two types together.
    """
    raised = [one for one in model.parameters() if one.requires_grad and one.dtype in HALF]
    for parameter in raised:
        parameter.data = parameter.data.float()
    model.luthier_upcast = bool(raised)  # type: ignore[assignment]
    return len(raised)


def write_type(model: nn.Module, folder: Path) -> None:
    """Let the saved config of an upcast model say float32, so that whoever loads it keeps what was learnt.

    transformers writes the type of the first weight there, which may be one that is frozen.
    """
    if not getattr(model, "luthier_upcast", False):
        return
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
