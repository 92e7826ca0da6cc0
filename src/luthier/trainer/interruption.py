"""SIGINT and SIGTERM in training: save a checkpoint, stop, and say so with an exit status of its own."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from luthier.trainer.processes import ALONE, Processes

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_WISHES = ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log")


class Interruption(TrainerCallback):
    """While it is entered, the first signal asks training to stop after the step in progress.

    A second signal does what it did before: the handler that was there is put back with the first one. Under torchrun
    it changes nothing: there signals come from several sides at once, and whoever does not end is killed. Outside of
    the main thread signals cannot be handled, and nothing changes. Of several processes all stop after the same step,
    whichever of them it reached; and so with all that callbacks before this one asked for on any of them.
    """

    def __init__(self, processes: Processes = ALONE) -> None:
        self.received: signal.Signals | None = None
        self._processes = processes
        self._before: dict[signal.Signals, Any] = {}
        self._patient = "TORCHELASTIC_RUN_ID" in os.environ

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
        if not self._patient:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def agree(self) -> signal.Signals | None:
        """The signal that any process has received until now, the same on all, which call this at the same point."""
        told = self._processes.exchange(self.received)
        return next((number for number in told if number is not None), None)

    def _stop(self, control: TrainerControl) -> None:
        wishes = {name: getattr(control, name) for name in _WISHES}
        told = self._processes.exchange((self.received, wishes))
        for name in _WISHES:  # a callback that looks at the clock may ask for it on one process alone
            setattr(control, name, any(wished[name] for _, wished in told))
        if any(number is not None for number, _ in told):
            control.should_save = True
            control.should_training_stop = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop(control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop(control)
