"""The table of optimizers: what a recipe says, the published formula, and what a new row inherits every check from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import util
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from luthier.recipe.schema import AnyOptimSpec

LR, DECAY, STEPS = 0.01, 0.1, 7
HEAD_DIM = 8
"""Of the tiny Llama."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a model, its value before the first step and its gradient in each."""

    name: str
    value: Tensor
    grads: Sequence[Tensor]

    @property
    def role(self) -> str:
        if "embed_tokens" in self.name:
            return "embedding"
        if "lm_head" in self.name:
            return "head"
        return "matrix" if self.value.ndim == 2 else "vector"


Formula = Callable[[Parameter, dict[str, Any]], Tensor]
"""(parameter, recipe's optim) -> its value after all steps, in float32, by the published formula."""


def adam(
    grads: Sequence[Tensor], betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> list[Tensor]:
    """Kingma & Ba (2014), algorithm 1: the direction of each step."""
    first, second, directions = torch.zeros_like(grads[0]), torch.zeros_like(grads[0]), []
    for t, g in enumerate(grads, start=1):
        first = betas[0] * first + (1 - betas[0]) * g
        second = betas[1] * second + (1 - betas[1]) * g * g
        directions.append((first / (1 - betas[0] ** t)) / ((second / (1 - betas[1] ** t)).sqrt() + eps))
    return directions


def decayed(value: Tensor, directions: Sequence[Tensor], lr: float = LR) -> Tensor:
    for direction in directions:
        value = value - lr * DECAY * value - lr * direction
    return value


def adamw(p: Parameter, optim: dict[str, Any]) -> Tensor:
    return decayed(p.value, adam(p.grads))


def sgd(p: Parameter, optim: dict[str, Any]) -> Tensor:
    value, buffer = p.value, torch.zeros_like(p.value)
    for g in p.grads:
        buffer = optim["momentum"] * buffer + g + DECAY * value
        value = value - LR * buffer
    return value


def lion(p: Parameter, optim: dict[str, Any]) -> Tensor:
    """Chen et al. (2023), algorithm 2."""
    value, m = p.value, torch.zeros_like(p.value)
    for g in p.grads:
        value = value - LR * (torch.sign(0.9 * m + 0.1 * g) + DECAY * value)
        m = 0.99 * m + 0.01 * g
    return value


def adafactor(p: Parameter, optim: dict[str, Any]) -> Tensor:
    """Shazeer & Stern (2018), algorithms 4 and 5, with the recipe's learning rate for the relative step."""
    value, row, column, second = p.value, 0.0, 0.0, 0.0
    for t, g in enumerate(p.grads, start=1):
        keep = 1 - t**-0.8
        squares = g * g + 1e-30
        if g.ndim == 2:
            row = keep * row + (1 - keep) * squares.mean(1, keepdim=True)
            column = keep * column + (1 - keep) * squares.mean(0, keepdim=True)
            v = row @ column / row.mean()
        else:
            v = second = keep * second + (1 - keep) * squares
        update = g / v.sqrt()
        update = update / max(1.0, float(update.square().mean().sqrt()))
        lr = LR * (
            max(1e-3, float(value.square().mean().sqrt()))
            if optim["type"] == "adalomo" or optim.get("scale_parameter")
            else 1.0
        )
        value = value - lr * DECAY * value - lr * update
    return value


def orthogonal(matrix: Tensor) -> Tensor:
    """Jordan et al. (2024): five quintic Newton-Schulz steps in bfloat16."""
    x = matrix.bfloat16().T if matrix.shape[0] > matrix.shape[1] else matrix.bfloat16()
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).float()


def muon(p: Parameter, optim: dict[str, Any]) -> Tensor:
    if p.role != "matrix":
        return adamw(p, optim)
    value, momentum = p.value, torch.zeros_like(p.value)
    for g in p.grads:
        momentum = 0.95 * momentum + g
        update = 0.2 * math.sqrt(max(g.shape)) * orthogonal(g + 0.95 * momentum)
        value = value - LR * (update + DECAY * value)
    return value


def schedule_free(p: Parameter, optim: dict[str, Any]) -> Tensor:
    """Defazio et al. (2024), algorithm 1 with x kept; the bias correction in the denominator. Returns the average x."""
    x = z = p.value
    second, total = torch.zeros_like(x), 0.0
    for t, g in enumerate(p.grads, start=1):
        y = 0.1 * z + 0.9 * x
        second = 0.999 * second + 0.001 * g * g
        z = z - LR * (g / ((second / (1 - 0.999**t)).sqrt() + 1e-8) + DECAY * y)
        total += LR**2
        x = (1 - LR**2 / total) * x + LR**2 / total * z
    return x


def bases(g: Tensor, rank: int) -> tuple[Tensor | None, Tensor | None]:
    """Zhao et al. (2024), section 4.1: singular vectors of the shorter side."""
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    return (None, vh[:rank]) if g.shape[0] >= g.shape[1] else (u[:, :rank], None)


def galore(p: Parameter, optim: dict[str, Any]) -> Tensor:
    """Zhao et al. (2024), algorithm 2: moments of P^T G, updates alpha P N."""
    if p.role != "matrix":
        return adamw(p, optim)
    left = right = None
    low, used = [], []
    for t, g in enumerate(p.grads):
        if t % optim["update_every"] == 0:
            left, right = bases(g, optim["rank"])
        used.append((left, right))
        low.append(left.T @ g if left is not None else g @ right.T)  # type: ignore[union-attr]
    updates = [
        optim["scale"] * (left @ n if left is not None else n @ right)
        for n, (left, right) in zip(adam(low), used, strict=True)
    ]
    return decayed(p.value, updates)


def apollo(p: Parameter, optim: dict[str, Any]) -> Tensor:
    """Zhu et al. (2024), algorithm 1, with the norm's growth limited to 1.01 a step before the bias correction; here with
    singular vectors, which need no common random numbers."""
    if p.role != "matrix":
        return adamw(p, optim)
    left = right = None
    low = []
    for t, g in enumerate(p.grads):
        if t % optim["update_every"] == 0:
            left, right = bases(g, optim["rank"])
        low.append(left.T @ g if left is not None else g @ right.T)  # type: ignore[union-attr]
    updates, before = [], None
    for t, (g, r, n) in enumerate(zip(p.grads, low, adam(low), strict=True), start=1):
        correction = math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        axis = 0 if g.shape[0] < g.shape[1] else 1
        update = g * (n.norm(dim=axis, keepdim=True) / r.norm(dim=axis, keepdim=True)) / correction
        if before is not None and update.norm() > 1.01 * before:
            update = update * (1.01 * before / update.norm())
        before = update.norm()
        updates.append(math.sqrt(optim["scale"]) * correction * update)
    return decayed(p.value, updates)


def badam(p: Parameter, optim: dict[str, Any]) -> Tensor:
    """Luo et al. (2024), algorithm 1: Adam from nothing on one block, K steps each; two layers here."""
    if ".layers." not in p.name:
        return p.value
    layer, every = int(p.name.split(".layers.")[1][0]), optim["switch_every"]
    value = p.value
    for begin in range(0, STEPS, every):
        if begin // every % 2 == layer:
            value = decayed(value, adam(p.grads[begin : begin + every]))
    return value


def badam_ratio(p: Parameter, optim: dict[str, Any]) -> Tensor:
    """Luo et al. (2024), appendix: the same of neighbouring entries of each tensor; embeddings and head stay."""
    if p.role in ("embedding", "head"):
        return p.value
    flat, every = p.value.reshape(-1).clone(), optim["switch_every"]
    count = max(1, int(flat.numel() * optim["ratio"]))
    for turn, begin in enumerate(range(0, STEPS, every)):
        entries = [(turn * count + i) % flat.numel() for i in range(count)]
        grads = [g.reshape(-1)[entries] for g in p.grads[begin : begin + every]]
        flat[entries] = decayed(flat[entries], adam(grads))
    return flat.view_as(p.value)


def adam_mini(p: Parameter, optim: dict[str, Any]) -> Tensor:
    """Zhang et al. (2024), algorithm 1 and 2: the mean of a block's squared gradients is its second moment."""
    if p.value.ndim < 2:
        blocks = (1, -1)
    elif "q_proj" in p.name or "k_proj" in p.name:
        blocks = (p.value.shape[0] // HEAD_DIM, -1)
    else:
        blocks = (p.value.shape[0], -1)
    value, first, second = p.value, torch.zeros_like(p.value), torch.zeros(1)
    for t, g in enumerate(p.grads, start=1):
        first = 0.9 * first + 0.1 * g
        second = 0.999 * second + 0.001 * (g * g).reshape(blocks).mean(1, keepdim=True)
        root = (second / (1 - 0.999**t)).sqrt() + 1e-8
        update = ((first / (1 - 0.9**t)).reshape(blocks) / root).view_as(value)
        value = value - LR * (update + DECAY * value)
    return value


def lomo(p: Parameter, optim: dict[str, Any]) -> Tensor:
    """Lv et al. (2023), algorithm 1: gradient descent."""
    return decayed(p.value, [g.clamp(-optim["clip_value"], optim["clip_value"]) for g in p.grads])


@dataclass(frozen=True)
class Case:
    """optim: what the recipe says beside lr and weight_decay. tolerance: of the largest change."""

    optim: dict[str, Any]
    formula: Formula
    tolerance: float = 2e-5
    needs: str | None = None
    family: str = "llama"
    train: dict[str, Any] = field(default_factory=dict)
    """What a recipe's train section needs with it."""

    @property
    def spec(self) -> Any:
        return TypeAdapter(AnyOptimSpec).validate_python({"lr": LR, "weight_decay": DECAY, **self.optim})

    @property
    def installed(self) -> bool:
        return self.needs is None or util.find_spec(self.needs) is not None


LARGE = "qwen3-moe"
ONE_PASS = {"tokens_per_pass": 4096}
CASES: dict[str, Case] = {
    "adamw": Case({"type": "adamw"}, adamw),
    "sgd": Case({"type": "sgd", "momentum": 0.0}, sgd),
    "sgd_momentum": Case({"type": "sgd", "momentum": 0.9}, sgd),
    "lion": Case({"type": "lion"}, lion),
    "adafactor": Case({"type": "adafactor"}, adafactor),
    "adafactor_scaled": Case({"type": "adafactor", "scale_parameter": True}, adafactor),
    # its directions are bfloat16 numbers after fifteen products of bfloat16 matrices
    "muon": Case({"type": "muon"}, muon, tolerance=5e-2),
    "schedule_free": Case({"type": "schedule_free"}, schedule_free),
    "galore": Case({"type": "galore", "rank": 4, "update_every": 3, "scale": 0.25}, galore, tolerance=2e-4),
    "galore_layerwise": Case(
        {"type": "galore", "rank": 4, "update_every": 3, "scale": 2.0, "layerwise": True, "max_grad_norm": 0},
        galore,
        tolerance=2e-4,
        train=ONE_PASS,
    ),
    "apollo": Case(
        {"type": "apollo", "rank": 4, "update_every": 3, "scale": 4.0, "projection": "svd"},
        apollo,
        tolerance=2e-4,
    ),
    "badam": Case({"type": "badam", "switch_every": 2}, badam),
    "badam_ratio": Case({"type": "badam_ratio", "ratio": 0.3, "switch_every": 3}, badam_ratio),
    "adam_mini": Case({"type": "adam_mini"}, adam_mini),
    "lomo": Case({"type": "lomo", "clip_value": 1.0}, lomo, train=ONE_PASS),
    "adalomo": Case({"type": "adalomo"}, adafactor, train=ONE_PASS),
    # Its experts are stacked, so they are large enough for 8 bits. Moments there follow AdamW's within some percent of the way
    "adamw_8bit": Case(
        {"type": "adamw", "bits": 8}, adamw, tolerance=0.1, needs="bitsandbytes", family=LARGE
    ),
    "adamw_paged": Case({"type": "adamw", "paged": True}, adamw, needs="bitsandbytes"),
    "lion_8bit": Case({"type": "lion", "bits": 8}, lion, tolerance=0.5, needs="bitsandbytes", family=LARGE),
}
WITHOUT_FORMULA: dict[str, Case] = {
    "apollo_random": Case(
        {"type": "apollo", "rank": 2, "update_every": 2, "scale_type": "tensor", "scale_front": True}, apollo
    ),
    "apollo_layerwise": Case(
        {"type": "apollo", "rank": 2, "update_every": 2, "layerwise": True, "max_grad_norm": 0},
        apollo,
        train=ONE_PASS,
    ),
    "badam_random": Case(
        {"type": "badam", "switch_every": 1, "order": "random", "include_head": True}, badam
    ),
    "badam_ratio_scatter": Case(
        {"type": "badam_ratio", "ratio": 0.3, "switch_every": 2, "mask": "scatter"}, badam_ratio
    ),
    "galore_full": Case({"type": "galore", "rank": 4, "update_every": 2, "side": "full"}, galore),
}
"""Variants whose state and resume are checked as the others' are; their formulas are random or tested apart."""


def give_gradients(model: nn.Module, step: int) -> None:
    """Gradients that depend on the step and the parameter's number alone; those that backward would not make stay out."""
    for number, parameter in enumerate(model.parameters()):
        if parameter.requires_grad:
            gradient = gradient_of(parameter, number, step)
            # as autograd does it, so that hooks of the parameter run
            (parameter * gradient.to(parameter.dtype)).sum().backward()


def gradient_of(parameter: Tensor, number: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + number)
    return torch.randn(parameter.shape, generator=generator)
