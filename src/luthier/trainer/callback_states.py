"""What callbacks keep in checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers.trainer_callback import ExportableState


def export_states(exporters: Iterable[Any], states: Any) -> None:
    """Put the state of everything that has one into the dictionary `states`, by the name of its class."""
    for exporter in exporters:
        if isinstance(exporter, ExportableState):
            states[type(exporter).__name__] = exporter.state()


def load_states(callbacks: Iterable[Any], states: Any) -> None:
    """Give callbacks the attributes that their checkpoint holds; their arguments are the recipe's."""
    for callback in callbacks:
        if isinstance(callback, ExportableState) and type(callback).__name__ in states:
            for name, value in states[type(callback).__name__]["attributes"].items():
                setattr(callback, name, value)
