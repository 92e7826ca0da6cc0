"""What a run counts: sums since the last log line, the mean over its whole life, and its bad steps.

A checkpoint keeps the ledger, so that the log of a run that was resumed, however often, reads like that of an
uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from luthier.trainer.bad_numbers import NumberGuard
from luthier.trainer.processes import ALONE, Processes
from luthier.trainer.steps import NOBODY
from luthier.types import Term


class Ledger:
    """Follows the steps of a run; `guard` says which of them are bad.

    Sums of metrics are those of this process; what a checkpoint keeps is of all.
    """

    def __init__(self, guard: NumberGuard, processes: Processes = ALONE) -> None:
        self.guard, self._processes = guard, processes
        self.metrics: dict[str, Term] = {}
        self.window_steps = self.window_bad = 0
        self.loss_sum, self.loss_steps = 0.0, 0
        self._loss, self._rows = 0.0, list[tuple[str, int]]()
        self.left_out = False

    # ---- a step ----------------------------------------------------------------------------------------

    def begin_step(self, step: int) -> bool:
        """Whether step `step` (from 1) is to be trained; False where a rewind left its rows behind."""
        self.window_steps += 1
        self.left_out = self.guard.leaves_out(step)
        self.window_bad += self.left_out
        return not self.left_out

    def forget_step(self) -> None:
        """Take back `begin_step`: nothing of the step has happened."""
        self.window_steps -= 1

    def leave_out(self, metrics: Mapping[str, Term]) -> None:
        """Note that the step under way, which there was nothing to learn in, changes nothing."""
        self.left_out = True
        self.window_bad += 1
        add_terms(self.metrics, metrics)

    def add_loss(self, loss: float, metrics: Mapping[str, Term], rows: Iterable[tuple[str, int]]) -> bool:
        """Note the loss of the whole step; returns whether it is a number."""
        self._loss, self._rows = loss, [row for row in rows if row[0] != NOBODY]
        if not math.isfinite(loss):
            return False
        self.loss_sum += loss
        self.loss_steps += 1
        add_terms(self.metrics, metrics)
        return True

    def judge(self, step: int, grad_norm: float | None) -> bool:
        """Whether the optimizer may take the step. `grad_norm` is None where a loss scaler looks after it.

        Raises BadNumbersError or Rewind as the recipe says.
        """
        reason = self.guard.reason(self._loss, grad_norm)
        if reason is None:
            self.guard.good(self._loss)
            return True
        if not math.isfinite(self._loss):
            self.window_bad += 1  # its loss is in no sum
        # The sums that were judged are the same everywhere, so every process comes here.
        rows = [row for rows in self._processes.exchange(self._rows) for row in rows]
        self.guard.bad(step, reason, rows)
        return False

    # ---- the log ---------------------------------------------------------------------------------------

    def close_window(self, logs: dict[str, float], means: Mapping[str, float]) -> None:
        """Complete a training line: means over the good steps alone, and how many bad ones there were so far."""
        good = self.window_steps - self.window_bad
        if self.window_bad:
            logs["loss"] = logs["loss"] * self.window_steps / good if good else math.nan
        logs.update(means)
        if self.guard.num_skipped:
            logs["bad_steps"] = self.guard.num_skipped
        self.metrics, self.window_steps, self.window_bad = {}, 0, 0

    @property
    def mean_loss(self) -> float:
        """The mean loss over all good steps of the run, resumed or not."""
        return self.loss_sum / self.loss_steps if self.loss_steps else math.nan

    # ---- checkpoints -----------------------------------------------------------------------------------

    def state(self, window_loss: float) -> dict[str, Any]:
        """JSON values; `window_loss` is this process's part of the losses since the last line. All processes ask."""
        (loss,) = self._processes.total([window_loss])
        metrics = self._processes.sums(
            {name: (float(term.total), float(term.weight)) for name, term in self.metrics.items()}
        )
        return {
            "window_loss": loss / self._processes.count,  # parts are averaged
            "window_steps": self.window_steps,
            "window_bad": self.window_bad,
            "loss_sum": self.loss_sum,
            "loss_steps": self.loss_steps,
            "metrics": metrics,
            "guard": self.guard.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> float:
        """Go on from `state`; returns the sum of losses since the last line."""
        self.window_steps, self.window_bad = state["window_steps"], state["window_bad"]
        self.loss_sum, self.loss_steps = state["loss_sum"], state["loss_steps"]
        share = 1.0 if self._processes.is_first else 0.0
        self.metrics = {
            name: Term(*(torch.tensor(share * number, dtype=torch.float64) for number in sums))
            for name, sums in state["metrics"].items()
        }
        self.guard.restore(state["guard"])
        return float(state["window_loss"])


def add_terms(sums: dict[str, Term], terms: Mapping[str, Term]) -> None:
    """Add terms to sums of the same names, in float64 and without a graph."""
    for name, term in terms.items():
        total, weight = term.total.detach().double(), term.weight.detach().double()
        known = sums.get(name)
        sums[name] = (
            Term(total, weight) if known is None else Term(known.total + total, known.weight + weight)
        )
