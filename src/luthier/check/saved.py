"""What autograd keeps of a forward pass until its backward: pieces of memory, each counted once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from luthier.model.quantized_layers import is_int8, plain_parts, stored_tensors


def storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """The pieces of memory behind the tensors, by their address; shared memory is there once."""
    pieces = [part.untyped_storage() for tensor in tensors for part in plain_parts(tensor)]
    return {piece.data_ptr(): piece for piece in pieces}


class _Kept:
    """A tensor for as long as autograd's graph has it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class SavedTensors(saved_tensors_hooks):
    """Counts the memory that autograd keeps for backward inside the block, each piece once. What it let go with a
    part of the graph that nothing needs is not counted: DoRA's norms are such.

    known: tensors that are there anyway (weights, buffers).
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        self._known = set(storages(known))
        self._kept: WeakSet[_Kept] = WeakSet()
        self._noted: list[Tensor] = []
        super().__init__(self._keep, lambda kept: kept.tensor)

    def _keep(self, tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        self._kept.add(kept)
        return kept

    def note(self, tensor: Tensor) -> None:
        """Count a tensor that is kept where these hooks do not see it."""
        self._noted.append(tensor)

    def release(self) -> list[int]:
        """The bytes of each piece that is still kept; they are forgotten. Call it while the outputs are there."""
        found = storages([*(kept.tensor for kept in self._kept), *self._noted])
        self._kept.clear()
        self._noted.clear()
        return [piece.nbytes() for address, piece in found.items() if address not in self._known]


@contextmanager
def saved_of(model: nn.Module) -> Iterator[SavedTensors]:
    """Inside the block everything is counted that a forward pass of `model` keeps beside its weights.

    The layers of LLM.int8() keep their input where autograd's hooks do not see it, checkpointing or not.
    """
    saved = SavedTensors(stored_tensors(model))

    def note(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled() and arguments[0].requires_grad:
            saved.note(arguments[0])

    hooks = [layer.register_forward_pre_hook(note) for layer in model.modules() if is_int8(layer)]
    try:
        with saved:
            yield saved
    finally:
        for hook in hooks:
            hook.remove()
