"""Which of a PEFT model's adapters compute, changed for a moment; PEFT's own way also changes what trains.

`set_adapter` lets every matrix of what it turns on train, and holds all others still. A policy and its critic are two
adapters that both train, and each is asked in every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


def adapted_layers(module: nn.Module) -> list[Any]:
    """The layers below `module` that hold adapters, wrappers of modules that train as a whole among them."""
    return [one for one in module.modules() if isinstance(one, BaseTunerLayer | AuxiliaryTrainingWrapper)]


@contextmanager
def _only(layers: Sequence[Any], name: str) -> Iterator[None]:
    before = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = [name]
    try:
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer._active_adapter = active


class _Recomputed:
    """A checkpointing function whose layer computes with one adapter in the backward pass too."""

    def __init__(self, checkpointing: Callable[..., Any], layers: Sequence[Any], name: str) -> None:
        self.checkpointing, self._layers, self._name = checkpointing, layers, name

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def run(*inner: Any, **named: Any) -> Any:
            with _only(self._layers, self._name):
                return function(*inner, **named)

        return self.checkpointing(run, *args, **kwargs)


@contextmanager
def computing_with(module: nn.Module, name: str) -> Iterator[None]:
    """In the block `module` computes with the adapter `name` alone, as do the backward passes of what it computes here;
    what trains stays as it is. A layer without that adapter computes as its base does."""
    checkpointed: list[Any] = [
        one for one in module.modules() if getattr(one, "gradient_checkpointing", False)
    ]
    before = [one._gradient_checkpointing_func for one in checkpointed]
    for one, checkpointing in zip(checkpointed, before, strict=True):
        one._gradient_checkpointing_func = _Recomputed(checkpointing, adapted_layers(one), name)
    try:
        with _only(adapted_layers(module), name):
            yield
    finally:
        for one, checkpointing in zip(checkpointed, before, strict=True):
            one._gradient_checkpointing_func = checkpointing


@contextmanager
def keeping_adapters(model: PeftModel) -> Iterator[None]:
    """After the block the adapters that were active are active again, and what was there trains or not as before.

    For what PEFT does to a model on the way: adding an adapter, or choosing one. Parameters that are new stay as they
    are then.
    """
    tuner: Any = model.base_model
    active = [(layer, layer._active_adapter) for layer in adapted_layers(model)]
    chosen, of_tuner = model.active_adapter, tuner.active_adapter
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        model.active_adapter, tuner.active_adapter = chosen, of_tuner
        for layer in adapted_layers(model):
            layer._active_adapter = of_tuner if isinstance(of_tuner, list) else [of_tuner]
        for layer, name in active:
            layer._active_adapter = name
        for parameter, trains in trained:
            parameter.requires_grad_(trains)
