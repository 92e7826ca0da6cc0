"""Linear layers whose weights lie in memory as a CPU's matrix kernel reads them (oneDNN's blocked layout).

A token of a few rows is bound by reading every weight once. From the usual layout the kernel first copies each weight
into its own; done once, ahead of the first token, that copy is saved at every step. For a model that only answers:
packed weights are no parameters, and cannot train.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_ROWS_HINT = 8
"""Rows that the layout is chosen for; any number works."""


class PackedLinear(nn.Module):
    """y = x W^T + b for a W (outputs, inputs) in float32 that is kept packed alone."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS_HINT)
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self._packed, self.bias, "none", [], "")
        return output


def can_pack(model: nn.Module) -> bool:
    """Whether this torch packs weights, and the model has some on a CPU in float32 for it."""
    first = next(model.parameters())
    return (
        first.device.type == "cpu"
        and first.dtype == torch.float32
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def pack_linears(model: nn.Module) -> int:
    """Pack every plain linear layer of a model that will not train again; how many they were.

    A weight that another module uses too (tied embeddings) is kept beside its packed copy; the others are freed.
    Layers of adapters are left as they are, and so are those below them: tuners read the weights of their base.
    """
    inside_tuners = {
        id(part) for module in model.modules() if hasattr(module, "base_layer") for part in module.modules()
    }
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and id(child) not in inside_tuners and _is_plain(child.weight):
                setattr(parent, name, PackedLinear(child))
                count += 1
    return count


def _is_plain(weight: Any) -> bool:
    return type(weight) is nn.Parameter and weight.dtype == torch.float32 and weight.device.type == "cpu"
