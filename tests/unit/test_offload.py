"""Activation offload: what is moved, what stays, and that backward finds the same bits. A copy stands for the host's
memory here, because on a CPU nothing is moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from luthier.data.collate import flat_batch
from luthier.model import offload
from luthier.model.load import load_model, locate
from luthier.model.logprobs import ModelPolicy
from luthier.model.offload import (
    HostActivations,
    Moved,
    offload_activations,
    offloads_activations,
    without_offload,
)
from luthier.model.value_head import install_score_forward
from luthier.recipe.schema import CheckpointingSpec, FullSpec, LoraSpec, MethodSpec, ModelSpec
from tests.activations import METHODS, ROWS, gradients_of, in_training
from tests.tiny import chat_model, random_samples, tiny_model

WAYS = {"plain": None, "checkpointed": CheckpointingSpec(), "reentrant": CheckpointingSpec(reentrant=True)}


class Copies:
    """Host memory that is another memory: clones, and what was copied into it."""

    def __init__(self) -> None:
        self.sources: list[Tensor] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        self.sources.append(tensor)
        return tensor.clone()

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [tuple(tensor.shape) for tensor in self.sources]


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Copies:
    made = Copies()
    monkeypatch.setattr(offload, "to_host", made)
    monkeypatch.setattr(HostActivations.__init__, "__defaults__", (1,))  # tiny models have tiny tensors
    return made


def built(family: str, method: MethodSpec, spec: CheckpointingSpec | None) -> Any:
    return in_training(tiny_model(family), method, spec)


def inner(model: Any) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients_are_the_same_bits(
    method: str, way: str, rows: str, autocast: torch.dtype | None, copies: Copies
) -> None:
    model = built("llama", METHODS[method], WAYS[way])
    loss, plain = gradients_of(model, ROWS[rows], autocast)
    assert copies.sources == []
    offload_activations(inner(model))
    again_loss, again = gradients_of(model, ROWS[rows], autocast)
    assert len(copies.sources) > 2
    assert again_loss == loss
    for name, gradient in plain.items():
        assert torch.equal(again[name], gradient), name
    assert max(float(gradient.abs().max()) for gradient in plain.values()) > 0


def test_a_copy_that_is_wrong_shows(copies: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward really reads what came back from the host."""
    model = built("llama", FullSpec(), None)
    _, plain = gradients_of(model, ROWS["flat"])
    offload_activations(model)
    monkeypatch.setattr(
        offload, "to_host", lambda tensor: tensor * 1.01 if tensor.is_floating_point() else tensor.clone()
    )
    _, wrong = gradients_of(model, ROWS["flat"])
    assert any(not torch.equal(wrong[name], gradient) for name, gradient in plain.items())


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_weights_stay_and_nothing_moves_twice(
    method: str, autocast: torch.dtype | None, copies: Copies
) -> None:
    model = built("llama", METHODS[method], None)
    offload_activations(inner(model))
    gradients_of(model, ROWS["flat"], autocast)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not weights & {tensor.untyped_storage().data_ptr() for tensor in copies.sources}
    places = [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in copies.sources]
    assert len(set(places)) == len(places)
    if method == "full":  # autocast's copies of what trains are weights too; no activation has their shapes
        shapes = {tuple(p.shape) for p in model.parameters() if p.ndim == 2}
        assert not shapes & ({*copies.shapes} | {shape[::-1] for shape in copies.shapes})


def test_torch_would_move_the_weights() -> None:
    """What the hooks of torch's own `save_on_cpu` are given: the reason for ours."""
    model, seen = built("llama", FullSpec(), None), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: seen.append(t.data_ptr()) or t.detach(), lambda t: t
    ):
        ModelPolicy(model).logprobs(ROWS["flat"])
    assert {p.data_ptr() for p in model.parameters()} & set(seen)
    assert len(set(seen)) < len(seen)  # and some tensors more than once


def test_with_checkpointing_the_inputs_of_layers_are_all_that_is_moved(copies: Copies) -> None:
    batch, hidden = ROWS["flat"], 32
    model = built("llama", FullSpec(), None)
    offload_activations(model)
    gradients_of(model, batch)
    without = sum(tensor.numel() for tensor in copies.sources)
    copies.sources.clear()
    model = built("llama", FullSpec(), CheckpointingSpec())
    offload_activations(model)
    gradients_of(model, batch)
    inputs = [shape for shape in copies.shapes if shape == (1, batch.num_tokens, hidden)]
    assert len(inputs) >= 2  # one for each layer; the last norm has its own
    assert sum(tensor.numel() for tensor in copies.sources) < without / 3


def test_small_tensors_stay(copies: Copies) -> None:
    least = ROWS["flat"].num_tokens * 32 * 4  # bytes of one hidden state
    model = built("llama", FullSpec(), None)
    hooks = HostActivations(model, least)
    with hooks:
        loss = -ModelPolicy(model).logprobs(ROWS["flat"]).logprobs.sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert copies.sources
    assert min(tensor.numel() * tensor.element_size() for tensor in copies.sources) == least


def test_an_expanded_tensor_is_as_small_as_its_memory(copies: Copies) -> None:
    value = torch.ones(1, requires_grad=True)
    with HostActivations(nn.Identity(), 1024):
        result = torch.randn(1).expand(4096) * value
    result.sum().backward()  # type: ignore[no-untyped-call]
    assert copies.sources == [] and value.grad is not None


def test_another_tensor_at_the_same_address_is_another(copies: Copies) -> None:
    """Storages come and go within a pass: a new one must not be taken for one that was moved before."""
    hooks, packed, values = HostActivations(nn.Identity(), 1), [], []
    for value in range(50):
        tensor = torch.full((64,), float(value))
        packed.append(hooks.pack_hook(tensor))
        values.append(value)
        del tensor
    assert [float(hooks.unpack_hook(one)[0]) for one in packed] == values


def test_a_tensor_that_changed_in_between_is_moved_again(copies: Copies) -> None:
    hooks, tensor = HostActivations(nn.Identity(), 1), torch.zeros(8)
    first = hooks.pack_hook(tensor)
    tensor += 1
    second = hooks.pack_hook(tensor)
    third = hooks.pack_hook(tensor)
    assert isinstance(first, Moved) and isinstance(second, Moved) and isinstance(third, Moved)
    assert second.host is third.host and len(copies.sources) == 2
    assert [float(hooks.unpack_hook(one)[0]) for one in (first, second)] == [0.0, 1.0]


def test_on_a_cpu_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostActivations.__init__, "__defaults__", (1,))
    kept: list[tuple[Tensor, Tensor]] = []
    to_host: Callable[[Tensor], Tensor] = offload.to_host

    def watched(tensor: Tensor) -> Tensor:
        kept.append((tensor, to_host(tensor)))
        return kept[-1][1]

    monkeypatch.setattr(offload, "to_host", watched)
    model = built("llama", LoraSpec(rank=4), None)
    _, plain = gradients_of(model, ROWS["flat"])
    offload_activations(inner(model))
    _, again = gradients_of(model, ROWS["flat"])
    assert kept and all(host.data_ptr() == tensor.data_ptr() for tensor, host in kept)
    assert all(torch.equal(again[name], gradient) for name, gradient in plain.items())


def test_only_where_gradients_are_computed(copies: Copies) -> None:
    model = built("llama", FullSpec(), None)
    offload_activations(model)
    with torch.no_grad():
        ModelPolicy(model).logprobs(ROWS["flat"])
    assert copies.sources == []
    with without_offload(model):
        gradients_of(model, ROWS["flat"])
        assert copies.sources == [] and not offloads_activations(model)
    assert offloads_activations(model)


def test_reward_models_too(copies: Copies, tmp_path: Any) -> None:
    folder = chat_model(tmp_path / "model")
    spec = ModelSpec(path=str(folder), dtype="float32", attention="sdpa", activation_offload=True)
    torch.manual_seed(0)
    model: Any = load_model(spec, locate(spec), torch.device("cpu"), kind="reward")
    install_score_forward(model)
    found = []
    for moved in (True, False):
        model.luthier_offload = moved
        ModelPolicy(model.train()).scores(flat_batch(random_samples([6, 9]))).sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
        assert copies.sources
    assert all(torch.equal(found[0][name], gradient) for name, gradient in found[1].items())


@pytest.mark.parametrize("wanted", [False, True])
def test_the_loader_does_what_the_recipe_says(wanted: bool, tmp_path: Any) -> None:
    folder = chat_model(tmp_path / "model")
    spec = ModelSpec(path=str(folder), dtype="float32", attention="sdpa", activation_offload=wanted)
    assert offloads_activations(load_model(spec, locate(spec), torch.device("cpu"))) is wanted
