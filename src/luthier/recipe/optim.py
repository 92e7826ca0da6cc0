"""The optimizer part of a recipe."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

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
    "reduce_lr_on_plateau",
    "greedy",
]
AT_EVALUATIONS = ("reduce_lr_on_plateau", "greedy")
"""Schedules that take a step at evaluations, by `train.best_metric`."""


class GroupSpec(Spec):
    """Parameters with a learning rate or a weight decay of their own."""

    match: str
    """A regular expression, looked for in the names of parameters that train. The first entry that matches wins."""
    lr: float | None = Field(default=None, ge=0)
    lr_scale: float | None = Field(default=None, ge=0)
    """Times the learning rate that these parameters would have had."""
    weight_decay: float | None = Field(default=None, ge=0)

    @field_validator("match")
    @classmethod
    def _compiles(cls, match: str) -> str:
        try:
            re.compile(match)
        except re.error as error:
            raise ValueError(f"{match!r} is no regular expression: {error}") from error
        return match

    @model_validator(mode="after")
    def _says_something(self) -> GroupSpec:
        if self.lr is not None and self.lr_scale is not None:
            raise ValueError("give lr or lr_scale, not both")
        if self.lr is None and self.lr_scale is None and self.weight_decay is None:
            raise ValueError("give lr, lr_scale or weight_decay")
        return self


class OptimSpec(Spec):
    """What every optimizer shares."""

    lr: float = Field(default=1e-4, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    schedule: ScheduleName = "cosine"
    schedule_options: dict[str, Any] = {}
    """Passed to transformers' schedule of that name (`num_cycles`, `min_lr`, ...), or to your own. For
    warmup_stable_decay, `num_stable_steps` and `num_decay_steps` may be shares of all steps (below 1)."""
    schedule_function: str | None = None
    """A schedule of your own in the place of `schedule`, as `package.module:name` or `file.py:name`. It is called with
    the steps taken and the number of all steps, and returns a factor of every group's learning rate."""
    warmup: float = Field(default=0.0, ge=0)
    """Share of all steps if below 1, else a number of steps."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Clip the global gradient norm to this; 0 switches clipping off."""
    groups: list[GroupSpec] = []
    """Learning rates and weight decays of parameters by their names; what no entry matches keeps those above."""

    @property
    def in_backward(self) -> bool:
        """Whether parameters are updated within the backward pass, each as soon as its gradient is there."""
        return bool(getattr(self, "layerwise", False))

    @model_validator(mode="after")
    def _one_schedule(self) -> OptimSpec:
        if self.schedule_function is not None and self.warmup:
            raise ValueError("warmup: schedule_function decides about the first steps too; remove warmup")
        if self.schedule in AT_EVALUATIONS and self.schedule_function is None and self.warmup:
            raise ValueError(f"warmup: schedule {self.schedule} has none; remove it")
        return self

    @model_validator(mode="after")
    def _clipping(self) -> OptimSpec:
        if self.in_backward and self.max_grad_norm:
            raise ValueError(
                "max_grad_norm: parameters are updated in the backward pass, before the norm of all gradients is "
                "known; write max_grad_norm: 0"
            )
        return self


class AdamwSpec(OptimSpec):
    """AdamW (Loshchilov & Hutter, 2017, arXiv:1711.05101), torch's own; bitsandbytes' with `bits` or `paged`."""

    type: Literal["adamw"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    bits: Literal[8, 32] = 32
    """8: moments in blocks of 8-bit numbers (Dettmers et al., 2021, arXiv:2110.02861); embeddings keep 32 bits."""
    paged: bool = False
    """The GPU's driver moves moments to host memory where the GPU's is full."""


class SgdSpec(OptimSpec):
    """Stochastic gradient descent, torch's own."""

    type: Literal["sgd"] = "sgd"
    momentum: float = Field(default=0.0, ge=0)


class LionSpec(OptimSpec):
    """Lion (Chen et al., 2023, arXiv:2302.06675): the sign of a momentum. It wants a learning rate 3 to 10 times
    smaller than AdamW's, and a weight decay larger by as much."""

    type: Literal["lion"] = "lion"
    betas: tuple[float, float] = (0.9, 0.99)
    bits: Literal[8, 32] = 32
    """8: bitsandbytes' with a momentum in 8 bits."""
    paged: bool = False
    """The GPU's driver moves the momentum to host memory where the GPU's is full."""


class AdafactorSpec(OptimSpec):
    """Adafactor (Shazeer & Stern, 2018, arXiv:1804.04235), transformers' own, with the recipe's learning rate."""

    type: Literal["adafactor"] = "adafactor"
    eps: tuple[float, float] = (1e-30, 1e-3)
    """Added to squared gradients; and the least root mean square of a parameter, for `scale_parameter`."""
    clip_threshold: float = Field(default=1.0, gt=0)
    """Largest root mean square of an update before the learning rate."""
    decay_rate: float = Field(default=-0.8, lt=0)
    scale_parameter: bool = False
    """Multiply the learning rate by the parameter's root mean square."""


class MuonSpec(OptimSpec):
    """Muon (Jordan et al., 2024), torch's own, for the weight matrices of layers; AdamW for embeddings, output head,
    norms and biases."""

    type: Literal["muon"] = "muon"
    momentum: float = Field(default=0.95, ge=0, lt=1)
    nesterov: bool = True
    ns_steps: int = Field(default=5, gt=0, lt=100)
    """Iterations that make an update orthogonal."""
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """How the learning rate follows a matrix's shape. The first makes updates as large as AdamW's (arXiv:2502.16982),
    so both parts share one learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of the AdamW part."""
    eps: float = Field(default=1e-8, gt=0)
    """Of the AdamW part."""


class ScheduleFreeSpec(OptimSpec):
    """Schedule-free AdamW (Defazio et al., 2024, arXiv:2405.15682): averages in the place of a decaying learning rate.
    What is evaluated and saved is the average."""

    type: Literal["schedule_free"] = "schedule_free"
    schedule: ScheduleName = "constant_with_warmup"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_lr_power: float = Field(default=2.0, ge=0)
    """A step's weight in the average is the largest learning rate so far to this power."""
    r: float = Field(default=0.0, ge=0)
    """And times the step's number to this power."""

    @model_validator(mode="after")
    def _no_schedule(self) -> ScheduleFreeSpec:
        if self.schedule not in ("constant", "constant_with_warmup") and self.schedule_function is None:
            raise ValueError(
                f"schedule: schedule_free takes the place of {self.schedule}; write constant_with_warmup or remove it"
            )
        if not 0 < self.betas[0] < 1:
            raise ValueError(
                "betas: the first is the share of the average in the training point, above 0 and below 1"
            )
        return self


class LowRankSpec(OptimSpec):
    """What optimizers with moments of projected gradients share."""

    rank: int = Field(default=128, gt=0)
    update_every: int = Field(default=200, gt=0)
    """Steps between new projections."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Whose weight matrices are projected: all of the layers, or those whose module's name contains one of these."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    layerwise: bool = False
    """Update each parameter within the backward pass and free its gradient at once. It needs `max_grad_norm: 0` and
    steps of one pass."""


class GaloreSpec(LowRankSpec):
    """GaLore (Zhao et al., 2024, arXiv:2403.03507): Adam in the span of the gradient's largest singular vectors."""

    type: Literal["galore"] = "galore"
    scale: float = Field(default=0.25, gt=0)
    """Factor of projected updates."""
    side: Literal["std", "reverse_std", "left", "right", "full"] = "std"
    """Which side is projected; `std` is the shorter one, `full` both."""


class ApolloSpec(LowRankSpec):
    """APOLLO (Zhu et al., 2024, arXiv:2412.05270): plain gradients, scaled as Adam scales a projection of them."""

    type: Literal["apollo"] = "apollo"
    scale: float = Field(default=1.0, gt=0)
    """Updates are multiplied by its square root. APOLLO-Mini is rank 1, scale_type tensor, scale 128."""
    side: Literal["std", "left", "right"] = "std"
    """Which side is projected; `std` is the shorter one."""
    projection: Literal["random", "svd"] = "random"
    """Random projections are drawn anew in every step from their seed, and take no memory."""
    scale_type: Literal["channel", "tensor"] = "channel"
    """One factor for each channel of the longer side, or one for the matrix."""
    scale_front: bool = False
    """Scale before the growth of the update's norm is limited, not after."""
    seed: int = 0
    """Of random projections."""


class BadamSpec(OptimSpec):
    """BAdam (Luo et al., 2024, arXiv:2404.02827): Adam on one layer at a time; the others are frozen meanwhile.
    Embeddings and head do not train unless included."""

    type: Literal["badam"] = "badam"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    switch_every: int = Field(default=50, gt=0)
    """Steps on a layer before the next."""
    order: Literal["ascending", "descending", "random", "fixed"] = "ascending"
    start_block: int | None = Field(default=None, ge=0)
    """The first layer, counted from 0. Not with order random."""
    include_embedding: bool = False
    """A block of the embeddings, before the layers."""
    include_head: bool = False
    """A block of the output head and whatever else stands outside layers, after them."""
    seed: int = 0
    """Of the random order."""

    @model_validator(mode="after")
    def _start(self) -> BadamSpec:
        if self.order == "random" and self.start_block is not None:
            raise ValueError("start_block: the order is random; remove one of them")
        return self


class BadamRatioSpec(OptimSpec):
    """BAdam's ratio mode (arXiv:2404.02827): Adam on a part of every weight at a time, which moves on.
    Embeddings and head do not train unless included."""

    type: Literal["badam_ratio"] = "badam_ratio"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    ratio: float = Field(default=0.05, gt=0, le=1)
    """The part of each tensor that trains at a time."""
    switch_every: int = Field(default=100, gt=0)
    """Steps on a part before the next."""
    mask: Literal["adjacent", "scatter"] = "adjacent"
    """Neighbouring entries, or entries at random."""
    include_embedding: bool = False
    include_head: bool = False
    seed: int = 0
    """Of scattered entries."""


class AdamMiniSpec(OptimSpec):
    """Adam-mini (Zhang et al., 2024, arXiv:2406.16793): one second moment for each attention head or output neuron."""

    type: Literal["adam_mini"] = "adam_mini"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)


class LomoSpec(OptimSpec):
    """LOMO (Lv et al., 2023, arXiv:2306.09782): plain gradient descent within the backward pass; it keeps nothing."""

    type: Literal["lomo"] = "lomo"
    max_grad_norm: float = Field(default=0.0, ge=0)
    clip_value: float | None = Field(default=None, gt=0)
    """Largest absolute value of an entry of a gradient."""

    @property
    def in_backward(self) -> bool:
        return True


class AdalomoSpec(OptimSpec):
    """AdaLomo (Lv et al., 2023, arXiv:2310.10195): Adafactor's second moments and normalised updates within the
    backward pass. The learning rate is relative to each parameter's size: about 5e-4."""

    type: Literal["adalomo"] = "adalomo"
    max_grad_norm: float = Field(default=0.0, ge=0)
    eps: tuple[float, float] = (1e-30, 1e-3)
    """Added to squared gradients; and the least root mean square of a parameter."""
    clip_threshold: float = Field(default=1.0, gt=0)
    """Largest root mean square of an update before the learning rate."""
    decay_rate: float = Field(default=-0.8, lt=0)

    @property
    def in_backward(self) -> bool:
        return True


AnyOptimSpec = Annotated[
    AdamwSpec
    | SgdSpec
    | LionSpec
    | AdafactorSpec
    | MuonSpec
    | ScheduleFreeSpec
    | GaloreSpec
    | ApolloSpec
    | BadamSpec
    | BadamRatioSpec
    | AdamMiniSpec
    | LomoSpec
    | AdalomoSpec,
    Field(discriminator="type"),
]
