"""Gradient checkpointing: the layers that are named are computed twice, and not a bit of loss or gradients changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import luthier.model.attention  # noqa: F401  registers the attention's name
from luthier.model.checkpointing import checkpoint_layers
from luthier.model.load import load_model, locate
from luthier.model.logprobs import ModelPolicy, install_target_forward
from luthier.recipe.schema import (
    CheckpointingSpec,
    FullSpec,
    MethodSpec,
    ModelSpec,
)
from luthier.types import Batch, ModelError
from tests.activations import METHODS, ROWS, gradients_of, in_training
from tests.tiny import FAMILIES, chat_model

LAYERS = 4
WAYS = {
    "all": CheckpointingSpec(),
    "reentrant": CheckpointingSpec(reentrant=True),
    "every": CheckpointingSpec(every=2),
    "layers": CheckpointingSpec(layers=(1, -1), reentrant=True),
}


def model_of(family: str) -> PreTrainedModel:
    """Four layers, weights large enough that every number counts."""
    config: Any = FAMILIES[family]()
    config.num_hidden_layers = LAYERS
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types * (LAYERS // len(config.layer_types))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="luthier_segments")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    return model


class Calls:
    """How often the attention of each layer ran: hooks of the layer itself stay outside of what is repeated."""

    def __init__(self, model: nn.Module) -> None:
        modules = [m for name, m in model.named_modules() if name.endswith((".self_attn", ".attn"))]
        self.counts = [0] * len(modules)
        for number, module in enumerate(modules):
            module.register_forward_hook(lambda *_, number=number: self._count(number))

    def _count(self, number: int) -> None:
        self.counts[number] += 1


def computed(
    family: str,
    method: MethodSpec,
    spec: CheckpointingSpec | None,
    batch: Batch,
    autocast: torch.dtype | None = None,
) -> tuple[float, Mapping[str, Tensor], Sequence[int]]:
    """Loss, gradients of all that trains, and how often each layer's attention ran."""
    model = in_training(model_of(family), method, spec)
    calls = Calls(model)
    loss, found = gradients_of(model, batch, autocast)
    return loss, found, calls.counts


def chosen(spec: CheckpointingSpec) -> list[int]:
    if spec.layers:
        return sorted(number % LAYERS for number in spec.layers)
    return list(range(0, LAYERS, spec.every))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients_are_the_same_bits(method: str, way: str, rows: str) -> None:
    loss, plain, once = computed("llama", METHODS[method], None, ROWS[rows])
    again_loss, again, counts = computed("llama", METHODS[method], WAYS[way], ROWS[rows])
    assert once == [1] * LAYERS
    assert counts == [2 if number in chosen(WAYS[way]) else 1 for number in range(LAYERS)]
    assert again_loss == loss and again.keys() == plain.keys()
    for name, gradient in plain.items():
        assert torch.equal(again[name], gradient), name
    assert max(float(gradient.abs().max()) for gradient in plain.values()) > 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma3-window", "llama-tied"])
def test_families_with_dropout_windows_and_one_matrix(family: str, way: str) -> None:
    """GPT-2 drops in its layers in training: what is computed again must draw what was drawn."""
    loss, plain, _ = computed(family, FullSpec(), None, ROWS["flat"])
    again_loss, again, counts = computed(family, FullSpec(), WAYS[way], ROWS["flat"])
    assert sum(counts) == LAYERS + len(chosen(WAYS[way]))
    assert again_loss == loss
    for name, gradient in plain.items():
        assert torch.equal(again[name], gradient), name


def test_dropout_is_drawn_in_the_layers() -> None:
    """The equality above could fail: without its dropout the model has another loss."""
    base = model_of("gpt2")
    install_target_forward(base)
    batch = ROWS["flat"]
    with torch.no_grad():
        torch.manual_seed(2)
        dropped = ModelPolicy(base.train()).logprobs(batch).logprobs
        kept = ModelPolicy(base.eval()).logprobs(batch).logprobs
    assert float((dropped - kept).abs().max()) > 1e-2


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_autocast_holds_in_what_is_computed_again(method: str, reentrant: bool) -> None:
    spec = CheckpointingSpec(reentrant=reentrant)
    loss, plain, _ = computed("llama", METHODS[method], None, ROWS["flat"], torch.bfloat16)
    again_loss, again, counts = computed("llama", METHODS[method], spec, ROWS["flat"], torch.bfloat16)
    assert counts == [2] * LAYERS
    assert again_loss == loss
    assert loss != computed("llama", METHODS[method], None, ROWS["flat"])[0]
    for name, gradient in plain.items():
        assert torch.equal(again[name], gradient), name


def test_evaluations_compute_nothing_again() -> None:
    model = model_of("llama")
    checkpoint_layers(model, CheckpointingSpec(reentrant=True))
    install_target_forward(model)
    calls = Calls(model)
    with torch.no_grad():
        ModelPolicy(model.eval()).logprobs(ROWS["flat"])
    assert calls.counts == [1] * LAYERS


@pytest.mark.parametrize(
    ("spec", "numbers"),
    [
        (CheckpointingSpec(), [0, 1, 2, 3]),
        (CheckpointingSpec(every=2), [0, 2]),
        (CheckpointingSpec(every=3), [0, 3]),
        (CheckpointingSpec(every=9), [0]),
        (CheckpointingSpec(layers=(3, 1)), [1, 3]),
        (CheckpointingSpec(layers=(-1, 3, -4)), [0, 3]),
    ],
)
def test_which_layers(spec: CheckpointingSpec, numbers: list[int]) -> None:
    assert checkpoint_layers(model_of("llama"), spec) == numbers


def test_a_layer_that_is_not_there() -> None:
    with pytest.raises(ModelError) as caught:
        checkpoint_layers(model_of("llama"), CheckpointingSpec(layers=(1, 4)))
    assert str(caught.value) == (
        "model.gradient_checkpointing.layers: there is no layer 4; the model has 0 to 3"
    )


def test_a_model_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(ModelError) as caught:
        checkpoint_layers(model, CheckpointingSpec())
    assert str(caught.value) == (
        "model.gradient_checkpointing: LlamaForCausalLM does not compute activations again; set it to false"
    )


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        (False, [False, False]),
        (True, [True, True]),
        (CheckpointingSpec(every=2), [True, False]),
        (CheckpointingSpec(layers=(-1,)), [False, True]),
    ],
)
def test_the_loader_does_what_the_recipe_says(given: Any, flags: list[bool], tmp_path: Any) -> None:
    folder = chat_model(tmp_path / "model")
    spec = ModelSpec(path=str(folder), dtype="float32", attention="sdpa", gradient_checkpointing=given)
    model: Any = load_model(spec, locate(spec), torch.device("cpu"))
    assert [layer.gradient_checkpointing for layer in model.model.layers] == flags
