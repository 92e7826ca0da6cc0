"""How far a prediction is: a bar on a terminal, else a plain line after every tenth of the rows."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import IO, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class PredictionProgress:
    """Counts rows and generated tokens; a context manager that gives the terminal back.

    done: rows that were answered before, which do not count for the rate.
    """

    def __init__(
        self,
        total: int,
        *,
        done: int = 0,
        quiet: bool = False,
        file: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.done, self.rows, self.tokens = total, done, 0, 0
        self._file, self._quiet, self._clock = file or sys.stdout, quiet, clock
        self._started = clock()
        self._said = 10 * done // max(total, 1)
        draws = not quiet and self._file.isatty() and not Console(file=self._file).is_dumb_terminal
        self._bar = (
            Progress(
                TextColumn("predict"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=Console(file=self._file),
            )
            if draws
            else None
        )
        self._task: TaskID | None = None

    @property
    def seconds(self) -> float:
        return max(self._clock() - self._started, 1e-9)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def __enter__(self) -> Self:
        self._started = self._clock()
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("predict", total=self.total, completed=self.done, rate="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, tokens: int) -> None:
        """One row more, with this many tokens."""
        self.rows, self.tokens = self.rows + 1, self.tokens + tokens
        at, rate = self.done + self.rows, f"{self.tokens_per_second:.1f} tokens/s"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=at, rate=rate)
        elif not self._quiet and (10 * at // self.total > self._said or at == self.total):
            self._said = 10 * at // self.total
            print(f"predict {at}/{self.total}  {rate}", file=self._file, flush=True)
