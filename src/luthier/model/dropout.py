"""Dropout of a model, off for good."""

from __future__ import annotations

from torch import nn

_RATES = ("attention_dropout", "activation_dropout", "dropout", "hidden_dropout", "layerdrop")
"""Under which modules of transformers keep the rate of a dropout that is no module of its own."""


def drop_nothing(model: nn.Module) -> None:
    """Let a model compute in training mode what it computes in evaluation, whatever its config says."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in _RATES:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
