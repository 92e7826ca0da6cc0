"""Every optimizer: several steps equal the published formula; its state survives being written; its size is foretold."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from luthier.methods.groups import decay_groups
from luthier.optim.build import OPTIMIZERS, build_optimizer, release
from luthier.optim.state_size import state_bytes
from luthier.trainer.snapshot import num_bytes
from tests.optimizers import (
    CASES,
    DECAY,
    STEPS,
    WITHOUT_FORMULA,
    Case,
    Parameter,
    give_gradients,
    gradient_of,
)
from tests.tiny import tiny_model

ALL = CASES | WITHOUT_FORMULA


def needs(case: Case) -> None:
    if not case.installed:
        pytest.skip(f"{case.needs} is not installed")


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """One group, so that weight decay reaches every parameter."""
    return [{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": DECAY}]


def run(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        give_gradients(model, step)
        optimizer.step()
        optimizer.zero_grad()


def at_evaluation(optimizer: Any) -> None:
    if hasattr(optimizer, "eval"):
        optimizer.eval()


def test_every_optimizer_has_a_row() -> None:
    assert {case.optim["type"] for case in CASES.values()} == set(OPTIMIZERS)


@pytest.mark.parametrize("name", CASES)
def test_steps_equal_the_published_formula(name: str) -> None:
    case = CASES[name]
    needs(case)
    model = tiny_model(case.family)
    start = {key: p.detach().clone() for key, p in model.named_parameters()}
    names = dict(model.named_parameters())
    optimizer = build_optimizer(case.spec, groups_of(model), model)
    run(model, optimizer, 0, STEPS)
    at_evaluation(optimizer)
    changed = 0
    for number, (key, actual) in enumerate(names.items()):
        grads = [gradient_of(actual, number, step) for step in range(STEPS)]
        expected = case.formula(Parameter(key, start[key], grads), case.spec.model_dump())
        moved = float((expected - start[key]).abs().max())
        changed += moved > 0
        error = float((actual.detach() - expected).abs().max())
        # float32 has seven digits of the value itself
        assert error <= case.tolerance * moved + 3e-7 * float(start[key].abs().max()) * STEPS, (
            key,
            error,
            moved,
        )
    assert changed >= len(names) / 2


@pytest.mark.parametrize("name", CASES)
def test_no_weight_decay_is_another_result(name: str) -> None:
    """The comparison above sees weight decay."""
    case = CASES[name]
    needs(case)
    results = []
    for decay in (DECAY, 0.0):
        model = tiny_model("llama")
        optimizer = build_optimizer(case.spec, [{**groups_of(model)[0], "weight_decay": decay}], model)
        run(model, optimizer, 0, STEPS)
        results.append(model.model.layers[0].mlp.up_proj.weight.detach())
    assert not torch.allclose(*results, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ALL)
def test_state_survives_being_written(name: str, dtype: torch.dtype) -> None:
    """At every step: what is written and read by a new optimizer on a new model goes on bit by bit."""
    case = ALL[name]
    needs(case)
    straight = tiny_model(case.family).to(dtype)
    optimizer = build_optimizer(case.spec, groups_of(straight), straight)
    written = []
    for step in range(STEPS):
        at_evaluation(optimizer)
        stream = io.BytesIO()
        torch.save(optimizer.state_dict(), stream)
        written.append((stream, copy.deepcopy(straight.state_dict())))
        if hasattr(optimizer, "train"):
            optimizer.train()
        run(straight, optimizer, step, step + 1)
    at_evaluation(optimizer)
    for step in (0, 1, 3, STEPS - 1):
        stream, weights = written[step]
        resumed = tiny_model(case.family, seed=5).to(dtype)
        resumed.load_state_dict(weights)
        other = build_optimizer(case.spec, groups_of(resumed), resumed)
        stream.seek(0)
        other.load_state_dict(torch.load(stream, weights_only=True))
        if hasattr(other, "train"):
            other.train()
        run(resumed, other, step, STEPS)
        at_evaluation(other)
        for (key, expected), actual in zip(straight.named_parameters(), resumed.parameters(), strict=True):
            assert torch.equal(actual, expected), (step, key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "qwen3-moe"])
@pytest.mark.parametrize("name", ALL)
def test_state_has_the_size_that_was_foretold(name: str, family: str, dtype: torch.dtype) -> None:
    case = ALL[name]
    needs(case)
    model = tiny_model(family).to(dtype)
    expected = state_bytes(case.spec, model)
    optimizer = build_optimizer(case.spec, groups_of(model), model)
    most = 0
    for step in range(4):
        run(model, optimizer, step, step + 1)
        # not views of the parameters: what is there beside them
        most = max(most, num_bytes(optimizer.state_dict()))
    assert most == expected


@pytest.mark.parametrize("name", ["badam", "badam_ratio", "galore_layerwise", "adalomo"])
def test_what_is_released_is_as_before(name: str) -> None:
    model = tiny_model("llama")
    optimizer = build_optimizer(CASES[name].spec, groups_of(model), model)
    give_gradients(model, 0)
    optimizer.zero_grad()
    release(optimizer)
    assert all(parameter.requires_grad for parameter in model.parameters())
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    give_gradients(model, 0)
    for number, (key, parameter) in enumerate(model.named_parameters()):
        assert torch.equal(parameter, before[key])
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient_of(parameter, number, 0))


def test_decay_groups_reach_the_inner_optimizers() -> None:
    """Muon splits every group and keeps its weight decay and learning rate."""
    model = tiny_model("llama")
    optimizer = build_optimizer(CASES["muon"].spec, decay_groups(model, 0.3), model)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decays[id(parameter)] == (0.0 if "norm" in name else 0.3), name
    assert len(decays) == len(list(model.parameters()))
