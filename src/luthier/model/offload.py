"""Activation offload: what autograd saves in a training forward pass waits in host memory for its backward pass.

torch's own `save_on_cpu` moves every tensor that is saved: weights, which stay on the device anyway, among them, and a
tensor that three layers read three times. Here weights and small tensors stay, and each piece is moved once. With
gradient checkpointing what is saved is the input of each checkpointed layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

LEAST_BYTES = 1 << 20
"""Smaller tensors stay: a copy costs more time than it saves memory."""

_VIEWS_AND_CASTS = ("T", "Transpose", "Permute", "View", "UnsafeView", "ToCopy", "Alias", "Select", "Slice")


@dataclass(frozen=True, slots=True)
class Moved:
    """A saved tensor in host memory, and the device that it was on."""

    host: Tensor
    device: torch.device


class HostActivations(saved_tensors_hooks):
    """In the block, tensors that autograd saves go to host memory; backward brings them back, with the same bits.

    Weights and buffers of `model`, views and autocast's copies of weights that train, and tensors below `least_bytes`
    stay where they are. On a CPU the host's memory is the device's, and nothing is copied.
    """

    def __init__(self, model: nn.Module, least_bytes: int = LEAST_BYTES) -> None:
        self._least = least_bytes
        tensors = (*model.parameters(), *model.buffers())
        self._weights = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        # A weak reference to a storage keeps its address from being given to another one, and not its memory.
        self._seen: dict[tuple[Any, ...], tuple[StorageWeakRef, ref[Tensor]]] = {}
        super().__init__(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor | Moved:
        if not self._moves(tensor):
            return tensor.detach()  # the hook may not keep the tensor itself: its graph would hold itself
        storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        layout = (tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor._version)
        known = self._seen.get((storage.cdata, *layout))
        host = None if known is None else known[1]()
        if host is None:
            host = to_host(tensor.detach())
            self._seen[storage.cdata, *layout] = (storage, ref(host))
        return Moved(host, tensor.device)

    def _unpack(self, packed: Tensor | Moved) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        return packed.host.to(packed.device, non_blocking=packed.host.is_pinned())

    def _moves(self, tensor: Tensor) -> bool:
        if tensor.layout != torch.strided:
            return False
        storage = tensor.untyped_storage()
        # The smaller of what is read and what is there: an expanded tensor is larger than its memory.
        if min(tensor.numel() * tensor.element_size(), storage.nbytes()) < self._least:
            return False
        return storage.data_ptr() not in self._weights and not _is_weight(tensor)


def to_host(tensor: Tensor) -> Tensor:
    """`tensor` in host memory; from a GPU into pinned memory, in the order of its stream."""
    if tensor.device.type != "cuda":
        return tensor.to("cpu")
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _is_weight(tensor: Tensor) -> bool:
    """Whether a tensor is made of a weight that trains, by views and casts alone."""
    node: Any = tensor.grad_fn
    while node is not None:
        if hasattr(node, "variable"):
            return isinstance(node.variable, nn.Parameter)
        if node.name().removesuffix("Backward0") not in _VIEWS_AND_CASTS:
            return False
        node = node.next_functions[0][0]
    return False


def offload_activations(model: nn.Module) -> None:
    """From now on training forward passes of `model` keep in host memory what their backward passes need."""
    model.luthier_offload = True  # type: ignore[assignment]


def offloads_activations(model: nn.Module) -> bool:
    """Whether `offload_activations` was called on a model, or on one inside its wrappers."""
    return any(getattr(module, "luthier_offload", False) for module in model.modules())


@contextmanager
def keeping_activations(model: nn.Module) -> Iterator[None]:
    """Around a forward pass of the bare model: saved tensors go where they should."""
    if getattr(model, "luthier_offload", False) and torch.is_grad_enabled():
        with HostActivations(model):
            yield
    else:
        yield


@contextmanager
def without_offload(model: nn.Module) -> Iterator[None]:
    """Inside the block nothing is moved."""
    moved = [module for module in model.modules() if getattr(module, "luthier_offload", False)]
    for module in moved:
        module.luthier_offload = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in moved:
            module.luthier_offload = True  # type: ignore[assignment]
