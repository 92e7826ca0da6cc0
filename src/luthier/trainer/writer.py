"""Writes checkpoints in a thread of its own, one at a time. What goes wrong there surfaces here."""

from __future__ import annotations

import threading
from collections.abc import Callable

Job = Callable[[], None]


class CheckpointWriter:
    """Runs one job at a time, in the background or, where `asynchronous` is off, at once.

    At most one job is in flight: the next waits for it. An exception of a job is raised by the next call of
    any method, in the thread of the training loop.
    """

    def __init__(self, *, asynchronous: bool) -> None:
        self.asynchronous = asynchronous
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, job: Job) -> None:
        """Start `job` once the one before it is done. Raises what that one raised."""
        self.wait()
        if not self.asynchronous:
            job()
            return
        # Not a daemon: a process that ends by itself first finishes the checkpoint it has begun.
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint-writer")
        self._thread.start()

    def check(self) -> None:
        """Raise what a finished job raised; does not wait."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Until nothing is in flight. Raises what the job raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def finish(self) -> None:
        """Until nothing is in flight; raises nothing, for a run that ends with an error of its own."""
        if self._thread is not None:
            self._thread.join()

    def _run(self, job: Job) -> None:
        try:
            job()
        except BaseException as error:  # noqa: BLE001  it is raised again in the loop's thread
            self._error = error
