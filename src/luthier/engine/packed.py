"""Linear layers whose weights lie in memory as a CPU's matrix kernel reads them (oneDNN's blocked layout).

A token of a few rows is bound by reading every weight once. From the usual layout the kernel first copies each weight
into its own; done once, ahead of the first token, that copy is saved at every step. Packed weights are no parameters,
and cannot train: a model that only answers has them in place of its own (`pack_linears`), one that trains between its
answers beside them (`PackedCopies`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

_ROWS_HINT = 8
"""Rows that the layout is chosen for; any number works."""


class PackedLinear(nn.Module):
    """y = x W^T + b for a W (outputs, inputs) in float32 that is kept packed alone."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), _ROWS_HINT)
        self.bias = bias_O

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
                setattr(parent, name, PackedLinear(child.weight, child.bias))
                count += 1
    return count


def _is_plain(weight: Any) -> bool:
    return type(weight) is nn.Parameter and weight.dtype == torch.float32 and weight.device.type == "cpu"


class PackedCopies:
    """Packed copies of the linear layers of a model in training, as they are now, with plain LoRA added to its base.

    The sum of base and LoRA is rounded once more than training rounds it, by about 1e-7 of a weight. Layers of other
    tuners and other types are left as they are.
    """

    def __init__(self, model: nn.Module) -> None:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
        self._places: list[tuple[nn.Module, str, nn.Module, PackedLinear]] = []
        with torch.inference_mode():
            for parent, name, child in _outer_linears(model):
                weight_OI = _weight(child, child is head)
                if weight_OI is not None:
                    bias_O = getattr(child, "base_layer", child).bias
                    self._places.append((parent, name, child, PackedLinear(weight_OI, bias_O)))

    def __len__(self) -> int:
        return len(self._places)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the model computes with the copies."""
        for parent, name, _, copy in self._places:
            setattr(parent, name, copy)
        try:
            yield
        finally:
            for parent, name, own, _ in self._places:
                setattr(parent, name, own)


def copies_for(model: nn.Module) -> PackedCopies | None:
    """Packed copies of a model's weights; None where they cannot be, or take more than half of the free memory."""
    if not can_pack(model):
        return None
    size = sum(4 * child.in_features * child.out_features for _, _, child in _outer_linears(model))
    return PackedCopies(model) if size <= psutil.virtual_memory().available / 2 else None


def _outer_linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Linear layers and LoRA's around them, with their places; what is inside an adapter is part of that."""
    for name, child in model.named_children():
        if isinstance(child, nn.Linear | LoraLinear):
            yield model, name, child
        elif not hasattr(child, "base_layer"):
            yield from _outer_linears(child)


def _weight(layer: Any, is_head: bool) -> Tensor | None:
    """(O, I) what a layer multiplies by; None for one that does more than that."""
    base = getattr(layer, "base_layer", layer)
    # The head's class may be one that answers targets too (`model.logprobs`), and is a linear layer without them.
    plain = type(base) is nn.Linear or (is_head and base is layer and type(base).__bases__[-1] is nn.Linear)
    if not plain or not _is_plain(base.weight):
        return None
    weight_OI: Tensor = base.weight
    if base is layer or layer.disable_adapters:
        return weight_OI
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.merged or any(name in layer.lora_variant or layer.lora_bias[name] for name in names):
        return None
    for name in names:
        weight_OI = weight_OI + layer.get_delta_weight(name)
    return weight_OI
