"""Learning-rate schedules: transformers' by their names, or the user's own function."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler

from luthier.recipe.schema import OptimSpec
from luthier.types import RecipeError

Factor = Callable[..., float]
"""(steps taken, all steps, **schedule_options) -> the factor of every group's learning rate in the next step."""


def warmup_steps(spec: OptimSpec, num_steps: int) -> int:
    """Steps of linear warm-up: a share of all steps, rounded up, if below 1, else a number of steps."""
    return math.ceil(spec.warmup * num_steps) if spec.warmup < 1 else int(spec.warmup)


def build_schedule(
    spec: OptimSpec, optimizer: Optimizer, num_steps: int, function: Factor | None = None
) -> LRScheduler:
    """`function`, what `optim.schedule_function` names, or transformers' schedule of that name. Every group's own
    learning rate is scaled. Raises RecipeError for options that the schedule does not take."""
    if function is not None:
        return LambdaLR(optimizer, _checked(spec, function, num_steps))
    warmup = warmup_steps(spec, num_steps)
    try:
        schedule: LRScheduler = get_scheduler(
            spec.schedule,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=num_steps,
            scheduler_specific_kwargs=_options(spec, num_steps, warmup),
        )
        return schedule
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"optim.schedule_options does not fit optim.schedule={spec.schedule}: {error}"
        ) from error


def _options(spec: OptimSpec, num_steps: int, warmup: int) -> dict[str, Any]:
    """The schedule's options; shares of all steps become numbers of steps."""
    options = dict(spec.schedule_options)
    if spec.schedule != "warmup_stable_decay":
        return options
    for name in ("num_stable_steps", "num_decay_steps"):
        value = options.get(name)
        if isinstance(value, float) and 0 < value < 1:
            options[name] = math.ceil(value * num_steps)
    if "num_decay_steps" not in options:
        # LLaMA-Factory's: a third of what follows the warm-up stays at the peak, the rest decays.
        stable = options.get("num_stable_steps", (num_steps - warmup) // 3)
        options["num_decay_steps"] = max(1, num_steps - warmup - stable)
    return options


def _checked(spec: OptimSpec, function: Factor, num_steps: int) -> Callable[[int], float]:
    """The user's function as a schedule of one argument. It raises RecipeError where the function fails."""

    def factor(step: int) -> float:
        where = f"optim.schedule_function={spec.schedule_function} at step {step} of {num_steps}"
        try:
            value = function(step, num_steps, **spec.schedule_options)
        except Exception as error:  # user code may raise anything; it is the cause of what is raised here
            raise RecipeError(f"{where}: {type(error).__name__}: {error}") from error
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        if not plain or not math.isfinite(value) or value < 0:
            raise RecipeError(f"{where} gave {value!r}; a factor is a number from 0 on")
        return float(value)

    return factor
