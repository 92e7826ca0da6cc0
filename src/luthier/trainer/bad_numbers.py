"""What happens to a step whose loss or gradient is not a number, or whose loss jumps. It is never hidden.

    stop     the run ends with an error that names step and rows; the checkpoints stay as they were
    skip     the step changes nothing; too many in a row stop the run
    rewind   the weights go back to the last checkpoint, and the rows since then are not visited again

Each such step is a line of `bad_numbers.jsonl` in the run directory, with the rows that were in it.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from luthier.recipe.schema import BadNumbersSpec
from luthier.types import LuthierError

RECORD_NAME = "bad_numbers.jsonl"

Rows = Sequence[tuple[str, int]]
"""Where samples came from: (data set, row)."""

_SHOWN = 5
_MIN_WINDOW = 10
"""A spread of fewer losses than this says nothing."""


class BadNumbersError(LuthierError):
    """A run that stopped because of a number; its checkpoints are as they were before the step."""


class Rewind(Exception):
    """Training is to go on from the last checkpoint, without the steps up to and including `step`."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(reason)
        self.step = step
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Window:
    """Steps [first, last] that are not trained, because the weights went back behind them."""

    first: int
    last: int


class NumberGuard:
    """Judges every step before the optimizer sees it; of several processes all do, and the first one `writes`."""

    def __init__(self, spec: BadNumbersSpec, run_dir: Path, *, writes: bool = True) -> None:
        self.spec, self._writes = spec, writes
        self.path = run_dir / RECORD_NAME
        self.losses: deque[float] = deque(maxlen=spec.window)
        self.in_a_row = 0
        self.num_skipped = 0
        self.windows = [Window(*entry["not_trained"]) for entry in self._entries() if "not_trained" in entry]

    def leaves_out(self, step: int) -> bool:
        """Whether step `step` (from 1) lies in a window that was rewound."""
        return any(window.first <= step <= window.last for window in self.windows)

    def reason(self, loss: float, grad_norm: float | None = None) -> str | None:
        """Why this step is bad; None where it is not."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if grad_norm is not None and not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm} (the loss is {loss:.6g})"
        if self.spec.spike is None or len(self.losses) < min(_MIN_WINDOW, self.spec.window):
            return None
        mean, spread = fmean(self.losses), pstdev(self.losses)
        if loss > mean + self.spec.spike * spread:
            return (
                f"the loss jumped to {loss:.6g}: the last {len(self.losses)} were {mean:.6g} "
                f"with a spread of {spread:.2g}"
            )
        return None

    def good(self, loss: float) -> None:
        """A step that the optimizer takes."""
        self.losses.append(loss)
        self.in_a_row = 0

    def bad(self, step: int, reason: str, rows: Iterable[tuple[str, int]]) -> None:
        """Record the step; return where it is to be skipped.

        Raises Rewind, or BadNumbersError where the recipe says stop or its limit is reached.
        """
        rows = list(dict.fromkeys(rows))
        action = self.spec.action
        self._write({"current_steps": step, "reason": reason, "action": action, "rows": rows})
        where = f"step {step}: {reason}; its rows are {_named(rows)}"
        if action == "stop":
            raise BadNumbersError(
                f"{where}. The checkpoints before it are whole. train.bad_numbers.action=skip leaves such a "
                f"step out, rewind goes back to the last checkpoint; all rows are in {self.path}"
            )
        self.in_a_row += 1
        self.num_skipped += 1
        if action == "skip" and self.in_a_row > self.spec.limit:
            raise BadNumbersError(
                f"{where}. It is the {_ordinal(self.in_a_row)} bad step in a row, and train.bad_numbers.limit is "
                f"{self.spec.limit}; the rows are in {self.path}"
            )
        if action == "rewind":
            if len(self.windows) >= self.spec.limit:
                raise BadNumbersError(
                    f"{where}. The run went back {len(self.windows)} times already, and train.bad_numbers.limit is "
                    f"{self.spec.limit}; the rows are in {self.path}"
                )
            raise Rewind(step, where)

    def rewound(self, checkpoint_step: int, step: int) -> None:
        """The weights are those of `checkpoint_step` again; what was trained up to `step` is left out."""
        window = Window(checkpoint_step + 1, step)
        self.windows.append(window)
        self.losses.clear()
        self._write({"current_steps": checkpoint_step, "not_trained": [window.first, window.last]})

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"losses": list(self.losses), "in_a_row": self.in_a_row, "num_skipped": self.num_skipped}

    def restore(self, state: dict[str, Any]) -> None:
        self.losses = deque(state["losses"], maxlen=self.spec.window)
        self.in_a_row, self.num_skipped = state["in_a_row"], state["num_skipped"]

    def begin(self) -> None:
        """A run that starts anew has no record of another one."""
        if self._writes:
            self.path.unlink(missing_ok=True)
        self.windows = []

    def _entries(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        # The last line without its end is what a killed writer left.
        lines = self.path.read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def _write(self, entry: dict[str, Any]) -> None:
        if not self._writes:
            return
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")


def _named(rows: Rows) -> str:
    shown = ", ".join(f"{source} {index}" for source, index in rows[:_SHOWN])
    return f"{shown} and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else shown


def _ordinal(number: int) -> str:
    if number % 100 in (11, 12, 13):
        return f"{number}th"
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th') }"
