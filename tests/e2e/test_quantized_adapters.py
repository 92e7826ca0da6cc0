"""Adapters beside plain LoRA on quantized bases: those that are let through compute what they compute on the plain model
with the dequantized weights, train, and reload; the others are refused before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import luthier
from luthier.environment import detect_hardware
from luthier.methods import build_method
from luthier.methods.adapter_files import ON_QUANTIZED
from luthier.methods.lora import load_adapter
from luthier.model.load import load_model, locate
from luthier.model.quantized_layers import dequantized, quantized_layers
from luthier.recipe.load import load_recipe
from luthier.recipe.resolve import resolve
from luthier.recipe.schema import Recipe
from luthier.types import ModelError
from tests.tiny import chat_model, write_alpaca

KINDS = {
    "nf4": {"type": "bitsandbytes", "bits": 4},
    "int8": {"type": "bitsandbytes", "bits": 8},
    "torchao": {"type": "torchao", "name": "int8_weight_only"},
    "hqq": {"type": "hqq", "bits": 4, "group_size": 16},
}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "rank": 4},
    "dora": {"type": "lora", "rank": 4, "dora": True},
    "oft": {"type": "oft", "block_size": 16},
    "oft-exact": {"type": "oft", "block_size": 16, "neumann_terms": None},
    "vera": {"type": "vera", "rank": 16},
    "ia3": {"type": "ia3"},
    "miss": {"type": "miss", "rank": 8},
    "miss-bat": {"type": "miss", "rank": 8, "init": "bat"},
    "miss-mini": {"type": "miss", "rank": 8, "init": "mini", "mini_rank": 4},
}
FIELDS: dict[str, dict[str, Any]] = {
    "BEFT": {},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 50},
    "GRALORA": {"r": 4},
    "LILY": {},
    "LN_TUNING": {},
    "PVERA": {"r": 8},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 4},
    "VBLORA": {"vector_length": 32, "r": 4, "num_vectors": 16},
    "WAVEFT": {"n_frequency": 50},
}
METHODS |= {
    name.lower(): {"type": "peft", "config": {"peft_type": name, **more}} for name, more in FIELDS.items()
}
IDS = torch.tensor([[5, 9, 70, 33, 8, 101, 4, 60, 12]])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("model"), hidden_size=64, intermediate_size=128, head_dim=16)


def settings_of(model: Path, method: dict[str, Any], kind: str) -> Recipe:
    tree = {
        "model": {"path": str(model), "quantization": KINDS[kind]},
        "data": {"train": ["x"]},
        "method": method,
    }
    return resolve(load_recipe(tree), detect_hardware()).recipe


def bases(settings: Recipe) -> tuple[Any, Any]:
    """The quantized base, and the plain model with its dequantized weights."""
    source = locate(settings.model)
    rounded = load_model(settings.model, source, torch.device("cpu"))
    described = settings.model.model_copy(update={"quantization": None})
    plain = load_model(described, source, torch.device("cpu"))
    with torch.no_grad():
        for name, layer in quantized_layers(rounded).items():
            plain.get_parameter(f"{name}.weight").copy_(dequantized(layer))
    return rounded, plain


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found = model.eval()(IDS, attention_mask=torch.ones_like(IDS)).logits
    assert isinstance(found, Tensor)
    return found


def adapted(settings: Recipe) -> tuple[Any, Any]:
    """The same adapter with the same weights, drawn at random, on both bases."""
    pair = []
    for base in bases(settings):
        torch.manual_seed(0)
        made = build_method(settings.method).apply(base)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        pair.append(made)
    return pair[0], pair[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_it_computes_what_it_computes_on_the_dequantized_weights(model: Path, name: str, kind: str) -> None:
    settings = settings_of(model, METHODS[name], kind)
    if (name, kind) == ("dora", "int8"):
        with pytest.raises(ModelError, match=r"PEFT's DoRA does not get at the weights of LLM.int8\(\)"):
            adapted(settings)
        return
    rounded, plain = adapted(settings)
    expected = logits(plain)
    torch.testing.assert_close(logits(rounded), expected, rtol=0, atol=1e-5)
    with plain.disable_adapter():
        assert (logits(plain) - expected).abs().max() > 0.02


def test_all_that_are_let_through_are_tested() -> None:
    own = {"lora": "LORA", "oft": "OFT", "vera": "VERA", "ia3": "IA3", "miss": "MISS"}
    tested = {own.get(spec["type"]) or spec["config"]["peft_type"] for spec in METHODS.values()}
    assert tested == set(ON_QUANTIZED)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["dora", "eva", "oft", "vera", "ia3", "miss"])
def test_it_learns_leaves_the_base_and_reloads(model: Path, name: str, kind: str, tmp_path: Path) -> None:
    if (name, kind) == ("dora", "int8"):
        kind = "torchao"
    method = METHODS.get(name, {"type": "lora", "rank": 4, "init": "eva"})
    write_alpaca(tmp_path / "rows.json", 24)
    result = luthier.train(
        {
            "model": {"path": str(model), "quantization": KINDS[kind]},
            "data": {"train": ["rows.json"], "directory": str(tmp_path), "eval": ["rows.json"]},
            "method": method,
            "optim": {"type": "adamw", "lr": {"vera": 0.05, "ia3": 0.2}.get(name, 0.02)},
            "train": {"rows_per_device": 4, "epochs": 2, "log_every": 1, "output": str(tmp_path / "run")},
        },
        ["train.plots=false", f"data.cache={tmp_path / 'cache'}"],
        quiet=True,
    )
    lines = [json.loads(line) for line in (result.output / "trainer_log.jsonl").read_text().splitlines()]
    curve = [line["loss"] for line in lines if "loss" in line]
    assert curve[-1] < 0.98 * curve[0]
    saved = load_recipe(result.output / "recipe.yaml").recipe
    untouched, _ = bases(saved)
    expected = logits(untouched)
    loaded = load_adapter(bases(saved)[0], result.output)
    assert (logits(loaded) - expected).abs().max() > 1e-3
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), expected)
    # A run that only evaluates the folder finds the loss that training ended with.
    again = luthier.train(
        result.output / "recipe.yaml",
        [
            f"method={json.dumps({'type': 'lora', 'adapters': [str(result.output)]})}",
            "train.eval_only=true",
            f"train.output={tmp_path / 'evaluated'}",
        ],
        quiet=True,
    )
    assert again.metrics["eval_loss"] == result.metrics["eval_loss"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            {"type": "peft", "config": {"peft_type": "HRA", "r": 4}},
            "PEFT's HRA computes with the base's weights",
        ),
        ({"type": "peft", "config": {"peft_type": "LOHA", "r": 4}}, "PEFT's LOHA computes with the base's"),
        (
            {"type": "peft", "config": {"peft_type": "PEANUT"}},
            "PEFT's PEANUT computes with the base's weights",
        ),
        ({"type": "lora", "rank": 4, "init": "orthogonal"}, "init: orthogonal changes the base's weights"),
        (
            {"type": "lora", "rank": 4, "init": "pissa"},
            "init=pissa takes factors of plain linear weights.*loftq",
        ),
        ({"type": "lora", "rank": 4, "init": "olora"}, "init=olora takes factors of plain linear weights"),
        ({"type": "lora", "rank": 4, "init": "corda"}, "init=corda takes factors of plain linear weights"),
    ],
)
def test_the_others_are_refused(model: Path, method: dict[str, Any], message: str, kind: str) -> None:
    settings = settings_of(model, method, kind)
    with pytest.raises(ModelError, match=message):
        build_method(settings.method).apply(bases(settings)[0])


@pytest.mark.parametrize("name", ["HRA", "PEANUT"])
def test_what_is_refused_would_be_wrong_without_a_word(
    model: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason for the list: on 8 bits these run, with the rounded numbers for weights."""
    monkeypatch.setattr("luthier.methods.adapter.require_base", lambda model, config, label: None)
    more = {"r": 4} if name == "HRA" else {}
    settings = settings_of(model, {"type": "peft", "config": {"peft_type": name, **more}}, "int8")
    rounded, plain = adapted(settings)
    assert (logits(rounded) - logits(plain)).abs().max() > 0.05
