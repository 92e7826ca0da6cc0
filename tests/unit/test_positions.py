"""Stretched rotary positions: the cosines and sines of transformers with the same config written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import luthier
from luthier.data.collate import flat_batch
from luthier.methods.lora import load_adapter
from luthier.model.attention import SDPA
from luthier.model.load import load_model, locate
from luthier.model.logprobs import ModelPolicy, install_target_forward
from luthier.model.positions import (
    PositionsChange,
    positions_change,
    read_positions,
    recorded_positions,
    require_positions,
    stretch,
    stretch_loaded,
    write_positions,
)
from luthier.recipe.schema import ModelSpec, RopeScalingSpec
from luthier.types import ModelError
from tests.padded import PADDED
from tests.tiny import FAMILIES, chat_model, random_samples, tiny_model, write_alpaca

BY_HAND: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "original_max_position_embeddings": 256,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}


def turned(rotary: Any, length: int, *args: Any) -> Tensor:
    """Cosines and sines of all positions, (2, 1, length, head size)."""
    return torch.stack(rotary(torch.zeros(1), torch.arange(length)[None], *args))


@pytest.mark.parametrize("kind", BY_HAND)
def test_equal_to_a_config_by_hand(kind: str, tmp_path: Path) -> None:
    model_folder = chat_model(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    spec = ModelSpec(path=str(model_folder), dtype="float32", rope_scaling=RopeScalingSpec(type=kind))
    assert spec.rope_scaling is not None
    change = positions_change(AutoConfig.from_pretrained(model_folder), spec.rope_scaling, 1000)
    assert change == PositionsChange(kind, 4.0, 256, 1024)
    model: Any = load_model(spec, locate(spec), torch.device("cpu"), positions=change)
    assert model.config.max_position_embeddings == 1024

    by_hand = AutoConfig.from_pretrained(model_folder)
    by_hand.max_position_embeddings = 1024
    by_hand.rope_parameters = {**BY_HAND[kind], "rope_theta": 5000.0}
    assert model.config.rope_parameters == by_hand.rope_parameters
    expected = turned(LlamaRotaryEmbedding(by_hand), 1024)
    assert torch.equal(turned(model.model.rotary_emb, 1024), expected)

    unstretched = turned(LlamaRotaryEmbedding(AutoConfig.from_pretrained(model_folder)), 1024)
    # Dynamic positions are the model's own as far as it was stretched.
    assert torch.equal(unstretched, expected) == (kind == "dynamic")


def test_linear_is_a_slower_clock(tmp_path: Path) -> None:
    """Closed form: position 4 p of the stretched model is position p of the model as it was."""
    config = LlamaConfig(head_dim=8, max_position_embeddings=16)
    before = turned(LlamaRotaryEmbedding(config), 16)
    stretch(config, PositionsChange("linear", 4.0, 16, 64))
    torch.testing.assert_close(turned(LlamaRotaryEmbedding(config), 64)[:, :, ::4], before)


@pytest.mark.parametrize(
    ("max_length", "factor", "expected"),
    [
        (256, None, None),
        (257, None, PositionsChange("yarn", 2.0, 256, 512)),
        (513, None, PositionsChange("yarn", 3.0, 256, 768)),
        (100, 1.5, PositionsChange("yarn", 1.5, 256, 384)),
    ],
)
def test_factor(max_length: int, factor: float | None, expected: PositionsChange | None) -> None:
    spec = RopeScalingSpec(type="yarn", factor=factor)
    assert positions_change(FAMILIES["llama"](), spec, max_length) == expected


def test_factor_that_is_too_small() -> None:
    with pytest.raises(
        ModelError, match=r"factor=2 stretches 256 positions to 512, and data\.max_length=1,000"
    ):
        positions_change(FAMILIES["llama"](), RopeScalingSpec(factor=2.0), 1000)


def test_a_model_that_was_stretched_before() -> None:
    """What counts is the length before any stretch, as it is written in the config."""
    config = FAMILIES["llama"]()
    stretch(config, PositionsChange("llama3", 2.0, 256, 512))
    assert positions_change(config, RopeScalingSpec(type="yarn"), 500) is None
    assert positions_change(config, RopeScalingSpec(type="yarn"), 600) == PositionsChange(
        "yarn", 3.0, 256, 768
    )


def test_windowed_layers_stay() -> None:
    config: Any = FAMILIES["gemma3-window"]()
    before = {name: dict(layer) for name, layer in config.rope_parameters.items()}
    change = positions_change(config, RopeScalingSpec(type="linear"), 1024)
    assert change == PositionsChange("linear", 4.0, 256, 1024)
    stretch(config, change)
    assert config.rope_parameters["sliding_attention"] == before["sliding_attention"]
    theta = before["full_attention"]["rope_theta"]
    assert config.rope_parameters["full_attention"] == {
        "rope_type": "linear",
        "factor": 4.0,
        "rope_theta": theta,
    }
    rotary, plain = Gemma3RotaryEmbedding(config), Gemma3RotaryEmbedding(FAMILIES["gemma3-window"]())
    window, full = "sliding_attention", "full_attention"
    assert torch.equal(turned(rotary, 64, window), turned(plain, 64, window))
    torch.testing.assert_close(turned(rotary, 256, full)[:, :, ::4], turned(plain, 64, full))


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom", "mamba"])
def test_models_without_rotary_positions(family: str) -> None:
    config = (FAMILIES | PADDED)[family]()
    with pytest.raises(ModelError, match="no rotary positions that could be stretched; leave it out"):
        positions_change(config, RopeScalingSpec(), 1000)


def test_longrope_is_left_alone() -> None:
    config: Any = FAMILIES["phi3"]()
    config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 64,
    }
    with pytest.raises(ModelError, match=r"of type longrope, which is made for long texts already"):
        positions_change(config, RopeScalingSpec(), 1000)


@pytest.mark.parametrize("kind", BY_HAND)
@pytest.mark.parametrize("family", ["llama", "gemma3-window", "qwen3"])
def test_stretching_a_loaded_model(family: str, kind: str) -> None:
    change = PositionsChange(kind, 4.0, 256, 1024)
    loaded = tiny_model(family, "eager")
    stretch_loaded(loaded, change)
    config = FAMILIES[family]()
    stretch(config, change)
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    made.load_state_dict(loaded.state_dict())
    ids = torch.arange(3, 83)[None]
    mask = torch.ones_like(ids)
    assert torch.equal(made(ids, attention_mask=mask).logits, loaded(ids, attention_mask=mask).logits)


# ---- room ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "opt", "mpt"])
def test_learned_positions_end(family: str) -> None:
    config = (FAMILIES | PADDED)[family]()
    if family == "opt":
        config.max_position_embeddings = 256
    require_positions(config, 256, alone=False)
    with pytest.raises(
        ModelError, match=r"has 256 positions and the longest sample has 257.*data\.max_length=256"
    ):
        require_positions(config, 257, alone=True)


@pytest.mark.parametrize("family", ["llama", "gemma3-window", "mamba", "bloom", "bamba"])
def test_others_go_on(family: str) -> None:
    require_positions((FAMILIES | PADDED)[family](), 100_000, alone=False)


def longrope() -> Any:
    config: Any = FAMILIES["phi3"]()
    config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 16,
    }
    config.original_max_position_embeddings = 16
    return config


def test_longrope_needs_every_sample_alone() -> None:
    """A short sample says something else beside a long one, which the self-test's short segments cannot show."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(longrope(), attn_implementation=SDPA)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8.0)
    install_target_forward(model)
    policy = ModelPolicy(model)
    short, long = random_samples((14, 30))
    alone = policy.logprobs(flat_batch([short])).logprobs
    beside = policy.logprobs(flat_batch([short, long])).logprobs[: len(alone)]
    assert float((alone - beside).detach().abs().max()) > 1e-2
    assert torch.equal(policy.logprobs(flat_batch([short])).logprobs, alone)

    require_positions(model.config, 16, alone=False)
    require_positions(model.config, 30, alone=True)
    with pytest.raises(ModelError, match=r"more than 16 tokens \(longrope\).*train\.tokens_per_pass=1"):
        require_positions(model.config, 30, alone=False)


def test_dynamic_positions_end_with_the_stretch() -> None:
    config = FAMILIES["llama"]()
    stretch(config, PositionsChange("dynamic", 2.0, 256, 512))
    require_positions(config, 512, alone=False)
    with pytest.raises(ModelError, match=r"more than 512 tokens \(dynamic\)"):
        require_positions(config, 513, alone=True)


# ---- adapters ------------------------------------------------------------------------------------------------


def test_record(tmp_path: Path) -> None:
    change, other = PositionsChange("yarn", 2.0, 256, 512), PositionsChange("linear", 2.0, 256, 512)
    for name, value in (("a", change), ("b", change), ("c", other)):
        (tmp_path / name).mkdir()
        write_positions(tmp_path / name, value)
    (tmp_path / "plain").mkdir()
    a, b, c, plain = (str(tmp_path / name) for name in ("a", "b", "c", "plain"))
    assert read_positions(a) == change
    assert read_positions(plain) is None
    assert recorded_positions([a, b], None, decided=False) == change
    assert recorded_positions([a], change, decided=True) == change
    assert recorded_positions([], change, decided=True) == change
    assert recorded_positions([plain], None, decided=False) is None
    for adapters, wanted, decided in (
        ([a, c], None, False),
        ([plain, a], None, False),
        ([a], other, True),
        ([a], None, True),
        ([plain], change, True),
    ):
        with pytest.raises(ModelError, match=r"was trained with .*give the same model\.rope_scaling"):
            recorded_positions(adapters, wanted, decided=decided)
    (tmp_path / "a" / "positions.json").write_text('{"type": "yarn"}')
    with pytest.raises(ModelError, match=r"positions\.json is no record of stretched positions"):
        read_positions(a)


def recipe(model: Path, folder: Path, method: dict[str, Any], output: str) -> dict[str, Any]:
    write_alpaca(folder / "rows.json", 12)
    return {
        "model": {"path": str(model), "rope_scaling": {"type": "yarn"}},
        "data": {
            "train": ["rows.json"],
            "directory": str(folder),
            "cache": str(folder / "cache"),
            "max_length": 100,
            "dev_split": 4,
        },
        "method": method,
        "optim": {"type": "adamw", "lr": 1e-2},
        "train": {"output": str(folder / output), "max_steps": 3, "save_every": None, "plots": False},
    }


def test_full_run_saves_the_config(tmp_path: Path) -> None:
    model = chat_model(tmp_path / "model", max_position_embeddings=32)
    output = luthier.train(recipe(model, tmp_path, {"type": "full"}, "run"), quiet=True).output
    config = AutoConfig.from_pretrained(output)
    assert config.max_position_embeddings == 128
    assert config.rope_parameters == {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 32,
    }
    manifest = json.loads((output / "run.json").read_text())
    assert manifest["positions"] == {"type": "yarn", "factor": 4.0, "before": 32, "after": 128}


def test_adapter_brings_its_positions(tmp_path: Path) -> None:
    """Evaluated again by another run that does not speak of positions, and on a plain base: the same loss."""
    model = chat_model(tmp_path / "model", max_position_embeddings=32)
    first = recipe(model, tmp_path, {"type": "lora", "rank": 4}, "first")
    trained = luthier.train(first, quiet=True)
    assert read_positions(trained.output) == PositionsChange("yarn", 4.0, 32, 128)

    again = recipe(model, tmp_path, {"type": "lora", "adapters": [str(trained.output)]}, "again")
    del again["model"]["rope_scaling"]
    again["train"]["eval_only"] = True
    evaluated = luthier.train(again, quiet=True)
    assert evaluated.metrics["eval_loss"] == pytest.approx(trained.metrics["eval_loss"], rel=1e-6)

    ids = torch.arange(3, 90)[None]
    base = AutoModelForCausalLM.from_pretrained(model)
    plain = load_adapter(base, trained.output).eval()
    config = AutoConfig.from_pretrained(model)
    stretch(config, PositionsChange("yarn", 4.0, 32, 128))
    (tmp_path / "bare").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "bare" / name).write_bytes((trained.output / name).read_bytes())
    by_hand = load_adapter(
        AutoModelForCausalLM.from_pretrained(model, config=config), tmp_path / "bare"
    ).eval()
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, by_hand(ids).logits)

    again["model"]["rope_scaling"] = {"type": "linear"}
    with pytest.raises(ModelError, match=r"was trained with stretched positions \(yarn, 4 times"):
        luthier.train(again, ["train.output=" + str(tmp_path / "third")], quiet=True)


def test_nothing_to_stretch_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = chat_model(tmp_path / "model")
    output = luthier.train(recipe(model, tmp_path, {"type": "lora"}, "run")).output
    assert "model.rope_scaling changes nothing" in capsys.readouterr().out
    assert read_positions(output) is None
    assert "positions" not in json.loads((output / "run.json").read_text())
