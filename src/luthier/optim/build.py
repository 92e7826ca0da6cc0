"""Optimizers and learning-rate schedules from their part of the recipe."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from luthier.recipe.schema import AdamwSpec, OptimSpec, SgdSpec
from luthier.types import RecipeError

Groups = list[dict[str, Any]]


def _adamw(spec: AdamwSpec, groups: Groups) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=True)


def _sgd(spec: SgdSpec, groups: Groups) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=spec.lr, momentum=spec.momentum)


OPTIMIZERS: dict[str, Callable[[Any, Groups], torch.optim.Optimizer]] = {"adamw": _adamw, "sgd": _sgd}


def build_optimizer(spec: AdamwSpec | SgdSpec, groups: Groups) -> torch.optim.Optimizer:
    """The optimizer over parameter groups that carry their own weight decay."""
    return OPTIMIZERS[spec.type](spec, groups)


def warmup_steps(spec: OptimSpec, num_steps: int) -> int:
    """Steps of linear warm-up: a share of all steps, rounded up, if below 1, else a number of steps."""
    return math.ceil(spec.warmup * num_steps) if spec.warmup < 1 else int(spec.warmup)


def build_schedule(spec: OptimSpec, optimizer: torch.optim.Optimizer, num_steps: int) -> LRScheduler:
    """transformers' schedule of that name. Raises RecipeError for options that it does not take."""
    try:
        schedule: LRScheduler = get_scheduler(
            spec.schedule,
            optimizer,
            num_warmup_steps=warmup_steps(spec, num_steps),
            num_training_steps=num_steps,
            scheduler_specific_kwargs=dict(spec.schedule_options),
        )
        return schedule
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"optim.schedule_options does not fit optim.schedule={spec.schedule}: {error}"
        ) from error
