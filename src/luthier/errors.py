"""What can go wrong through no fault of the code.

Each error carries one message for the person who runs the command; the command line prints it alone.
"""

from __future__ import annotations


class LuthierError(Exception):
    """The base of every error that is the input's or the machine's fault, not a bug."""


class RecipeError(LuthierError):
    """A recipe that cannot be run: unknown key, wrong type, impossible combination."""


class DataError(LuthierError):
    """A data file, row, column or template that cannot be used."""


class RowError(DataError):
    """One row that cannot be used. It is dropped and counted under `reason`, a short phrase without values."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class ModelError(LuthierError):
    """A model, tokenizer or adapter that cannot be loaded or trained exactly."""


class CheckpointError(LuthierError):
    """A checkpoint or run directory that is damaged, foreign or in the way."""


class ExportError(LuthierError):
    """An export that cannot be written, or that is not the model that was trained."""


class RunInterrupted(LuthierError):
    """A run that a signal stopped after it had saved a checkpoint; the command line has a status for it."""


class ProcessFailed(LuthierError):
    """One of several processes that was killed, hung, or failed by a bug; the command line has a status for it."""
