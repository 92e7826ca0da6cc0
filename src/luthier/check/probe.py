"""A few real optimizer steps on real batches, timed, and the most memory that they took; the model is spent after."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from luthier.check.schedule import Schedule
from luthier.model.logprobs import ModelPolicy
from luthier.model.reference import Reference
from luthier.optim.build import build_optimizer
from luthier.recipe.schema import Recipe
from luthier.trainer.evaluation import observe
from luthier.trainer.memory import running_out
from luthier.trainer.pace import peak_memory
from luthier.trainer.precision import autocast_type
from luthier.trainer.steps import StepDataset
from luthier.types import Batch, Method, Stage

TIMED_PASSES = 6
"""Passes that are timed, spread over the epoch."""
TIMED_SECONDS = 20.0
"""After this long no further pass begins, if at least one was timed."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What was measured. `peak` is the most memory, in bytes, of the process or on the GPU; None where the system
    does not tell. Times are seconds; loading, evaluations and checkpoints are not in them."""

    passes: int
    tokens: int
    tokens_per_second: float
    optimizer_seconds: float
    seconds_per_epoch: float
    seconds: float
    """Of the whole run."""
    peak: int | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_probe(
    settings: Recipe,
    model: nn.Module,
    method: Method,
    stage: Stage,
    steps: StepDataset,
    schedule: Schedule,
    reference: Reference | None = None,
) -> Probe:
    """Measure on the recipe's own passes: the longest one first, then an optimizer step, then passes for time.

    reference: what the stage compares with, where it does. The first step makes the optimizer's states and is not
    timed; then the longest pass runs again beside them, as every later step of a run does. Tokens are those of the
    data: a prompt counts once, however often it is computed. The weights change; use the model for nothing afterwards.
    """
    device = next(model.parameters()).device
    runner = _Runner(settings, model, method, stage, device, reference)
    longest = _longest(steps, schedule)
    knows_peak = reset_peak(device)
    runner.run([longest])
    runner.step()
    if schedule.several_passes:
        runner.run([longest])
    tokens, seconds, passes = 0, 0.0, 0
    for batch, size in _spread(steps):
        started = time.perf_counter()
        runner.run([batch])
        seconds += time.perf_counter() - started
        tokens, passes = tokens + size, passes + 1
        if seconds > TIMED_SECONDS:
            break
    runner.run([longest])
    started = time.perf_counter()
    runner.step()
    per_step = time.perf_counter() - started
    per_epoch = schedule.tokens_per_epoch * seconds / tokens + schedule.steps_per_epoch * per_step
    return Probe(
        passes=passes,
        tokens=tokens,
        tokens_per_second=tokens / seconds,
        optimizer_seconds=per_step,
        seconds_per_epoch=per_epoch,
        seconds=per_epoch * schedule.epochs,
        peak=peak_memory() if knows_peak else None,
    )


class _Runner:
    """Forward, backward and optimizer steps as training does them, but for what only a long run needs."""

    def __init__(
        self,
        settings: Recipe,
        model: nn.Module,
        method: Method,
        stage: Stage,
        device: torch.device,
        reference: Reference | None,
    ) -> None:
        self._model, self._stage, self._device = model.train(), stage, device
        self._policy = ModelPolicy(model, reference=reference)
        self._arithmetic, self._norm = autocast_type(settings.train.precision), settings.optim.max_grad_norm
        groups = method.parameter_groups(model, settings.optim.weight_decay, settings.optim.lr)
        self._trained = [parameter for group in groups for parameter in group["params"]]
        self._optimizer = build_optimizer(settings.optim, groups, model)

    def run(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            moved, mixed = batch.to(self._device), self._arithmetic is not None
            with running_out(batch):
                with torch.autocast(self._device.type, dtype=self._arithmetic, enabled=mixed):
                    observed = observe(self._stage, self._policy, [moved], self._model)
                    loss = self._stage.loss(self._policy, moved, observed)
                    total = torch.stack([term.total / moved.num_tokens for term in loss.terms.values()])
                total.sum().backward()  # type: ignore[no-untyped-call]
        self._wait()

    def step(self) -> None:
        if self._norm:
            torch.nn.utils.clip_grad_norm_(self._trained, self._norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._wait()

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def _longest(steps: StepDataset, schedule: Schedule) -> Batch:
    step, number = schedule.longest_at
    return steps[step][number]


def _spread(steps: StepDataset) -> Iterator[tuple[Batch, int]]:
    """Passes of steps that lie evenly in the epoch, each with its tokens."""
    wanted = min(TIMED_PASSES, len(steps))
    for turn in range(TIMED_PASSES):
        step = (turn % wanted) * len(steps) // wanted
        passes = steps[step]
        number = (turn // wanted) % len(passes)
        yield passes[number], int(steps.plan.lengths[steps.plan[step][0][number]].sum())


def reset_peak(device: torch.device) -> bool:
    """Let `peak_memory` begin anew; False where the system cannot (it can on Linux and with CUDA)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
