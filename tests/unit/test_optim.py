"""Optimizers against their published formulas, schedules against transformers'."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from luthier.optim.build import build_optimizer
from luthier.optim.schedule import build_schedule, warmup_steps
from luthier.recipe.schema import AdamwSpec, OptimSpec, SgdSpec
from luthier.types import RecipeError

STEPS = 20


def one_parameter() -> tuple[list[dict[str, Any]], torch.nn.Module]:
    """A group of one parameter, and the model that holds it."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    return [{"params": [parameter], "weight_decay": 0.0}], torch.nn.ParameterList([parameter])


def rates(scheduler: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    values = []
    for _ in range(STEPS):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear", {}),
        ("cosine", {}),
        ("cosine", {"num_cycles": 1.5}),
        ("cosine_with_restarts", {"num_cycles": 3}),
        ("polynomial", {"power": 2.0, "lr_end": 1e-3}),
        ("constant", {}),
        ("constant_with_warmup", {}),
        ("inverse_sqrt", {}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.2}),
        ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.2}),
        ("warmup_stable_decay", {"num_decay_steps": 6}),
    ],
)
def test_schedules_equal_transformers(name: str, options: dict[str, Any]) -> None:
    spec = SgdSpec(lr=0.5, schedule=name, schedule_options=options, warmup=0.21)
    mine = build_optimizer(spec, *one_parameter())
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    # 0.21 x 20 = 4.2 steps of warm-up are 5
    theirs = get_scheduler(
        name, other, num_warmup_steps=5, num_training_steps=STEPS, scheduler_specific_kwargs=options
    )
    actual = rates(build_schedule(spec, mine, STEPS), mine)
    assert actual == rates(theirs, other)
    assert (len(set(actual)) == 1) == (name == "constant")


def test_linear_schedule_closed_form() -> None:
    spec = SgdSpec(lr=1.0, schedule="linear", warmup=4)
    optimizer = build_optimizer(spec, *one_parameter())
    expected = [step / 4 if step < 4 else (STEPS - step) / (STEPS - 4) for step in range(STEPS)]
    assert rates(build_schedule(spec, optimizer, STEPS), optimizer) == pytest.approx(expected)


def test_cosine_schedule_closed_form() -> None:
    spec = SgdSpec(lr=1.0, schedule="cosine")
    optimizer = build_optimizer(spec, *one_parameter())
    expected = [(1 + math.cos(math.pi * step / STEPS)) / 2 for step in range(STEPS)]
    assert rates(build_schedule(spec, optimizer, STEPS), optimizer) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("warmup", "num_steps", "expected"),
    [(0.0, 100, 0), (0.1, 100, 10), (0.03, 50, 2), (0.03, 10, 1), (0.999, 10, 10), (1.0, 100, 1), (7, 5, 7)],
)
def test_warmup(warmup: float, num_steps: int, expected: int) -> None:
    """A share is rounded up, as transformers does; from 1 on it is a number of steps."""
    assert warmup_steps(OptimSpec(warmup=warmup), num_steps) == expected


def test_unfitting_options_are_refused() -> None:
    spec = AdamwSpec(schedule="linear", schedule_options={"num_cycles": 2})
    optimizer = build_optimizer(spec, *one_parameter())
    with pytest.raises(RecipeError, match=r"optim\.schedule_options does not fit optim\.schedule=linear"):
        build_schedule(spec, optimizer, STEPS)


def two_groups(weight_decay: float) -> tuple[list[torch.nn.Parameter], list[dict[str, Any]]]:
    generator = torch.Generator().manual_seed(0)
    parameters = [
        torch.nn.Parameter(torch.randn(3, 2, generator=generator, dtype=torch.float64)) for _ in range(2)
    ]
    decays = (weight_decay, 0.0)
    return parameters, [
        {"params": [parameter], "weight_decay": decay}
        for parameter, decay in zip(parameters, decays, strict=True)
    ]


def gradient_of(step: int, index: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + index)
    return torch.randn(3, 2, generator=generator, dtype=torch.float64)


def test_adamw_formula() -> None:
    """Loshchilov & Hutter (2017), algorithm 2: decay apart from the moments, bias correction, eps outside."""
    lr, (b1, b2), eps, decay = 0.1, (0.8, 0.95), 1e-3, 0.3
    parameters, groups = two_groups(decay)
    values = [parameter.detach().clone() for parameter in parameters]
    moments = [(torch.zeros(3, 2), torch.zeros(3, 2)) for _ in parameters]
    optimizer = build_optimizer(
        AdamwSpec(lr=lr, betas=(b1, b2), eps=eps), groups, torch.nn.ParameterList(parameters)
    )
    for step in range(1, 6):
        for index, parameter in enumerate(parameters):
            g = parameter.grad = gradient_of(step, index)
            m, v = moments[index]
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            moments[index] = (m, v)
            update = m / (1 - b1**step) / ((v / (1 - b2**step)).sqrt() + eps)
            values[index] = values[index] - lr * (update + (decay, 0.0)[index] * values[index])
        optimizer.step()
    for parameter, value in zip(parameters, values, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_formula(momentum: float) -> None:
    lr, decay = 0.1, 0.3
    parameters, groups = two_groups(decay)
    values = [parameter.detach().clone() for parameter in parameters]
    buffers: list[torch.Tensor] = [torch.zeros(3, 2, dtype=torch.float64) for _ in parameters]
    optimizer = build_optimizer(SgdSpec(lr=lr, momentum=momentum), groups, torch.nn.ParameterList(parameters))
    for step in range(1, 6):
        for index, parameter in enumerate(parameters):
            parameter.grad = gradient_of(step, index)
            buffers[index] = momentum * buffers[index] + parameter.grad + (decay, 0.0)[index] * values[index]
            values[index] = values[index] - lr * buffers[index]
        optimizer.step()
    for parameter, value in zip(parameters, values, strict=True):
        torch.testing.assert_close(parameter.detach(), value)
