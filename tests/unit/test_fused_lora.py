"""The fused LoRA layer against PEFT's own forward and backward, and when it steps aside."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from luthier.methods import fused
from luthier.methods.fused import fuse_lora

INPUTS, OUTPUTS, RANK = 12, 10, 3


class Net(nn.Module):
    """One linear layer, so that a layer's own gradient is the model's."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(INPUTS, OUTPUTS, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def pair(
    *, bias: bool = True, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[PeftModel, PeftModel]:
    """The same layer twice: PEFT's own, and fused. The adapter's B is not zero."""
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=7, target_modules=["linear"], **options)
    plain = get_peft_model(Net(bias).to(dtype), config)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    other = copy.deepcopy(plain)
    assert fuse_lora(other) == 1
    return plain, other


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every fused product."""
    seen: list[int] = []
    apply = fused._LoraProduct.apply

    def counting(*args: Any) -> Any:
        seen.append(1)
        return apply(*args)

    monkeypatch.setattr(fused._LoraProduct, "apply", counting)
    return seen


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(2, 5, INPUTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.to(dtype).requires_grad_()


def results(model: nn.Module, x: Tensor, autocast: torch.dtype | None = None) -> dict[str, Tensor]:
    """Output, gradient of x, and gradients of all that trains, for one fixed upstream gradient."""
    model.zero_grad()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        y = model(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(y, [x, *wanted.values()], upstream.to(y.dtype))
    return {"y": y.detach(), "x": grads[0], **dict(zip(wanted, grads[1:], strict=True))}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_peft(bias: bool, rslora: bool, products: list[int]) -> None:
    plain, other = pair(bias=bias, use_rslora=rslora)
    actual = results(other, inputs())
    assert len(products) == 1
    assert len(actual) == 4  # y, x, A, B
    assert_same(actual, results(plain, inputs()))
    assert len(products) == 1


def test_closed_form(products: list[int]) -> None:
    """y = x W' + b + (alpha / r) x A' B', written out."""
    _, other = pair()
    layer, x = other.base_model.model.linear, inputs()
    low = x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    expected = x @ layer.base_layer.weight.T + layer.base_layer.bias + 7 / RANK * low
    torch.testing.assert_close(other(x), expected)
    assert len(products) == 1


def test_input_without_gradient(products: list[int]) -> None:
    """The first layer of a model: x asks for nothing, A and B do."""
    plain, other = pair()
    x = inputs().detach()
    for model in (plain, other):
        model(x).square().sum().backward()
    for mine, peft in zip(other.parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (peft.grad is None)
        if peft.grad is not None:
            torch.testing.assert_close(mine.grad, peft.grad)
    assert len(products) == 1


def test_autocast(products: list[int]) -> None:
    """bfloat16 arithmetic on float32 weights: as near to float64 as PEFT is, and gradients stay float32."""
    plain, other = pair(dtype=torch.float32)
    exact, _ = pair()
    actual = results(other, inputs(torch.float32), torch.bfloat16)
    expected = results(plain, inputs(torch.float32), torch.bfloat16)
    assert len(products) == 1
    truth = results(exact.double(), inputs(torch.float32).detach().double().requires_grad_())
    exact.load_state_dict(plain.state_dict())
    truth = results(exact, inputs(torch.float32).detach().double().requires_grad_())
    for name in expected:
        assert actual[name].dtype == expected[name].dtype, name
        scale = float(truth[name].abs().max())
        error = float((actual[name].double() - truth[name]).abs().max())
        assert error <= 0.02 * scale, f"{name}: {error} of {scale}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base(dtype: torch.dtype, products: list[int]) -> None:
    """A base in 16 bits with adapters in float32, as the recipe resolves it on a GPU, under autocast."""
    plain, other = pair(dtype=torch.float32)
    for model in (plain, other):
        model.base_model.model.linear.base_layer.to(dtype)
    actual = results(other, inputs(torch.float32), dtype)
    expected = results(plain, inputs(torch.float32), dtype)
    assert len(products) == 1
    for name in expected:
        assert actual[name].dtype == expected[name].dtype, name
    assert_same(actual, expected, rtol=0.05, atol=0.15)


def test_dropout_falls_back_only_in_training(products: list[int]) -> None:
    plain, other = pair(lora_dropout=0.5)
    torch.manual_seed(5)
    expected = results(plain.train(), inputs())
    torch.manual_seed(5)
    assert_same(results(other.train(), inputs()), expected)
    assert products == []
    assert_same(results(other.eval(), inputs()), results(plain.eval(), inputs()))
    assert len(products) == 1
    assert not torch.equal(expected["y"], results(plain, inputs())["y"])


def test_disabled_adapter(products: list[int]) -> None:
    plain, other = pair()
    with plain.disable_adapter(), other.disable_adapter():
        torch.testing.assert_close(other(inputs()), plain(inputs()))
        torch.testing.assert_close(other(inputs()), other.base_model.model.linear.base_layer(inputs()))
    assert products == []


def test_merged(products: list[int]) -> None:
    plain, other = pair()
    before = other(inputs()).detach()
    other.merge_adapter()
    assert len(products) == 1
    torch.testing.assert_close(other(inputs()).detach(), before)
    assert len(products) == 1
    other.unmerge_adapter()
    assert_same(results(other, inputs()), results(plain, inputs()))


def test_two_adapters(products: list[int]) -> None:
    """Two active at once run PEFT's code; each alone is fused."""
    plain, other = pair()
    for model in (plain, other):
        torch.manual_seed(9)
        model.add_adapter(
            "second", LoraConfig(r=2, lora_alpha=5, target_modules=["linear"], init_lora_weights=False)
        )
        model.base_model.set_adapter(["default", "second"])
    assert_same(results(other, inputs()), results(plain, inputs()))
    assert products == []
    outputs = []
    for name in ("default", "second"):
        plain.set_adapter(name)
        other.set_adapter(name)
        actual = results(other, inputs())
        assert_same(actual, results(plain, inputs()))
        outputs.append(actual["y"])
    assert len(products) == 2
    assert not torch.allclose(outputs[0], outputs[1])


def test_dora_falls_back(products: list[int]) -> None:
    plain, other = pair(use_dora=True)
    assert_same(results(other, inputs()), results(plain, inputs()))
    assert products == []


def test_lora_bias_falls_back(products: list[int]) -> None:
    plain, other = pair(lora_bias=True)
    assert_same(results(other, inputs()), results(plain, inputs()))
    assert products == []


def test_trained_base_falls_back(products: list[int]) -> None:
    """A base weight or bias that trains needs its own gradient, which the fused product does not give."""
    for part in ("weight", "bias"):
        plain, other = pair()
        for model in (plain, other):
            getattr(model.base_model.model.linear.base_layer, part).requires_grad_(True)
        actual = results(other, inputs())
        assert any(part in name for name in actual)
        assert_same(actual, results(plain, inputs()))
    assert products == []


def test_frozen_adapter_and_evaluation_without_grad_fall_back(products: list[int]) -> None:
    plain, other = pair()
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(inputs()), plain.eval()(inputs()))
    other.train().requires_grad_(False)
    torch.testing.assert_close(other(inputs()), plain(inputs()))
    assert products == []


def test_a_layer_that_will_be_computed_again_says_the_same_without_grad(products: list[int]) -> None:
    """Reentrant checkpointing runs a layer in training without gradients first, then with them."""
    plain, other = pair()
    with torch.no_grad():
        first = other.train()(inputs())
    assert len(products) == 1
    assert torch.equal(first, other(inputs()))
    torch.testing.assert_close(first, plain(inputs()))


def test_class_keeps_its_name() -> None:
    plain, other = pair()
    assert type(other.base_model.model.linear).__name__ == type(plain.base_model.model.linear).__name__
    assert fuse_lora(other) == 0  # a second time finds nothing left to do
