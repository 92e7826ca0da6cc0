"""The optimizer part of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.recipe.base import Spec

ScheduleName = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]


class OptimSpec(Spec):
    """What every optimizer shares."""

    lr: float = Field(default=1e-4, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    schedule: ScheduleName = "cosine"
    schedule_options: dict[str, Any] = {}
    """Passed to transformers' schedule of that name (`num_cycles`, `min_lr`, ...)."""
    warmup: float = Field(default=0.0, ge=0)
    """Share of all steps if below 1, else a number of steps."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Clip the global gradient norm to this; 0 switches clipping off."""


class AdamwSpec(OptimSpec):
    """AdamW (Loshchilov & Hutter, 2017, arXiv:1711.05101), torch's own."""

    type: Literal["adamw"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)


class SgdSpec(OptimSpec):
    """Stochastic gradient descent, torch's own."""

    type: Literal["sgd"] = "sgd"
    momentum: float = Field(default=0.0, ge=0)


AnyOptimSpec = Annotated[AdamwSpec | SgdSpec, Field(discriminator="type")]
