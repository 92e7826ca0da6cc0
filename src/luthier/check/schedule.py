"""Steps, tokens and passes of a run, read from the plan of its first epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from luthier.check.memory import PassShape, shape_of
from luthier.data.batching import EpochPlan
from luthier.recipe.schema import TrainSpec
from luthier.trainer.steps import StepDataset

EXAMINED = 1000
"""Steps of an epoch that are cut into passes here; in a longer epoch they are spread over it evenly."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a run goes through its data; all processes together, except for passes, which are of one."""

    steps_per_epoch: int
    steps: int
    epochs: float
    tokens_per_epoch: int
    tokens_per_step: float
    least_tokens: int
    most_tokens: int
    passes_per_step: float
    longest_pass: int
    """Positions of the longest pass, padding included."""
    padding_share: float
    """The part of all positions that is padding; 0 for flat rows."""
    longest_at: tuple[int, int]
    """Step and pass of the longest one."""
    several_passes: bool
    """Whether some step has more than one pass."""

    def to_dict(self) -> dict[str, Any]:
        tree = asdict(self)
        del tree["longest_at"], tree["several_passes"]
        return tree


def schedule_of(steps: StepDataset, spec: TrainSpec) -> Schedule:
    """The schedule of a run that has at least one step. Passes are those of the first epoch that the run reaches."""
    plan = steps.plan
    length = len(plan)
    tokens = [plan.tokens(step) for step in range(length)]
    wanted = spec.max_steps if spec.max_steps is not None else math.ceil(spec.epochs * length)
    longest, longest_at, counts = -1, (0, 0), []
    run = min(length, wanted)
    for step in np.unique(np.linspace(0, run - 1, min(run, EXAMINED)).astype(int)).tolist():
        passes = plan[step][0]
        counts.append(len(passes))
        for number, indices in enumerate(passes):
            positions = pass_positions(plan, indices)
            if positions > longest:
                longest, longest_at = positions, (step, number)
    return Schedule(
        steps_per_epoch=length,
        steps=wanted,
        epochs=wanted / length,
        tokens_per_epoch=sum(tokens),
        tokens_per_step=sum(tokens) / length,
        least_tokens=min(tokens),
        most_tokens=max(tokens),
        passes_per_step=sum(counts) / len(counts),
        longest_pass=longest,
        padding_share=plan.padding_share(),
        longest_at=longest_at,
        several_passes=max(counts) > 1,
    )


def pass_positions(plan: EpochPlan, indices: Sequence[int]) -> int:
    """Positions of a pass, padding included; what answers share of a prompt as often as it is computed."""
    sizes = (plan.lengths if plan.sizes is None else plan.sizes)[list(indices)]
    if not len(sizes):
        return 1
    return len(sizes) * int(sizes.max()) if plan.padded else int(sizes.sum())


def longest_shape(steps: StepDataset, schedule: Schedule) -> PassShape:
    """The longest pass with its number of targets."""
    step, number = schedule.longest_at
    return shape_of(steps[step][number], padded=steps.plan.padded)
