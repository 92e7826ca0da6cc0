"""The model that a policy is compared with: the one that training started from, or another.

    with reference.active(model) as frozen: ...

`active` gives the module to call; the policy itself, changed for a moment, or a model of its own. It knows nothing of
losses. Precomputed log-probabilities need none of these (`luthier.trainer.precompute`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from luthier.model.critic import critic_parameters


class Reference(Protocol):
    """A frozen model beside the one that trains."""

    def active(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """The module to call in place of `model`, the policy (wrapped or bare); without dropout."""
        ...


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, whatever mode the model is in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class AdaptersOff:
    """The base below the adapters of the policy itself: no memory at all."""

    def __init__(self, model: PeftModel) -> None:
        self._adapted = model

    @contextmanager
    def active(self, model: nn.Module) -> Iterator[nn.Module]:
        # PEFT lets every matrix of an adapter train once it is on again, those that are held still too.
        trained = {parameter: parameter.requires_grad for parameter in self._adapted.parameters()}
        try:
            with _evaluating(model), self._adapted.disable_adapter():
                yield model
        finally:
            for parameter, trains in trained.items():
                parameter.requires_grad_(trains)


class StartingPoint:
    """The policy as it was when this was made: a copy of what trains is swapped in for a moment.

    It costs the memory of the parameters that train: all of a full fine-tune, one adapter of a continued one. Where
    each process holds parts of them, it copies its parts; `model` has been divided before.
    """

    def __init__(self, model: nn.Module) -> None:
        critics = critic_parameters(model)  # they say nothing of the answer's tokens
        self._trained = [one for one in model.parameters() if one.requires_grad and one not in critics]
        self._copies = [_own(parameter.detach()).clone() for parameter in self._trained]

    @contextmanager
    def active(self, model: nn.Module) -> Iterator[nn.Module]:
        self._swap(model)
        try:
            with _evaluating(model):
                yield model
        finally:
            self._swap(model)

    def _swap(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule):  # what is gathered of the other weights is gathered anew
                module.reshard()
        # `data` and not the values: what autograd saved of an earlier forward pass stays as it is.
        for number, parameter in enumerate(self._trained):
            if isinstance(parameter, DTensor):  # autograd saves what is gathered of it
                _exchange(_own(parameter.detach()), self._copies[number])
            else:
                parameter.data, self._copies[number] = self._copies[number], parameter.data


def _own(parameter: Tensor) -> Tensor:
    """What this process holds of it."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _exchange(one: Tensor, other: Tensor) -> None:
    kept = one.clone()
    one.copy_(other)
    other.copy_(kept)


class AsItIs:
    """The policy itself, before its first step."""

    @contextmanager
    def active(self, model: nn.Module) -> Iterator[nn.Module]:
        with _evaluating(model):
            yield model


class OtherModel:
    """A model of its own, with the target forward installed; nothing of it trains."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.requires_grad_(False).eval()

    @contextmanager
    def active(self, model: nn.Module) -> Iterator[nn.Module]:
        with torch.no_grad():
            yield self.model
