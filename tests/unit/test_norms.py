"""Normalisation layers in float32 inside a 16-bit model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from luthier.model.attention import SDPA
from luthier.model.load import load_model, locate
from luthier.model.logprobs import ModelPolicy, install_target_forward
from luthier.model.norms import upcast_norms
from luthier.model.selftest import require_isolation, two_segments
from luthier.recipe.schema import ModelSpec
from tests.padded import PADDED
from tests.tiny import FAMILIES, VOCAB, chat_model, tiny_model

NORMS = {
    "llama": ["input_layernorm", "post_attention_layernorm", "norm"],
    "qwen3": ["input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "norm"],
    "gemma3-window": [
        *("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm"),
        *("post_feedforward_layernorm", "q_norm", "k_norm", "norm"),
    ],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "neox": ["input_layernorm", "post_attention_layernorm", "final_layer_norm"],
    "phi": ["input_layernorm", "final_layernorm"],
}


def is_norm(name: str, family: str) -> bool:
    return name.rsplit(".", 2)[-2] in NORMS[family]


@pytest.mark.parametrize("family", NORMS)
def test_exactly_the_norms_are_float32(family: str) -> None:
    model = tiny_model(family).to(torch.bfloat16)
    keys = list(model.state_dict())
    count = upcast_norms(model)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    for name, dtype in dtypes.items():
        assert dtype == (torch.float32 if is_norm(name, family) else torch.bfloat16), name
    assert count == len({name.rsplit(".", 1)[0] for name, dtype in dtypes.items() if dtype == torch.float32})
    assert list(model.state_dict()) == keys
    assert upcast_norms(model) == 0


@pytest.mark.parametrize("family", NORMS)
def test_computed_in_float32_and_cast_back(family: str) -> None:
    """Each layer, on the inputs that it really gets: the float32 layer's answer, rounded once."""
    model = tiny_model(family).to(torch.bfloat16)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_norm(name, family):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    upcast_norms(model)
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    handles = [
        module.register_forward_hook(lambda m, args, output: seen.update({m: (args[0], output)}))
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in NORMS[family]
    ]
    ids = torch.arange(3, 20)[None]
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert logits.dtype == torch.bfloat16
    assert len(seen) == len(handles) > 0
    for module, (given, output) in seen.items():
        plain = type(module).__mro__[2]
        assert given.dtype == output.dtype == torch.bfloat16
        assert torch.equal(output, plain.forward(module, given.float()).bfloat16())


@pytest.mark.parametrize("family", [*NORMS, "granite-scaled"])
def test_nearer_to_float32_and_isolated(family: str) -> None:
    """Flat rows still pass the self-test."""
    model = tiny_model(family).to(torch.bfloat16)
    upcast_norms(model)
    install_target_forward(model)
    result = require_isolation(model)
    assert result.leak == 0.0
    answers = ModelPolicy(model).logprobs(two_segments(VOCAB, torch.device("cpu")))
    assert answers.logprobs.dtype == torch.float32
    (-answers.logprobs.sum()).backward()
    assert all(p.grad is None or p.grad.dtype == p.dtype for p in model.parameters())


@pytest.mark.parametrize("family", ["bamba", "mamba", "mamba2", "qwen3-next", "bloom", "rwkv"])
def test_gated_and_own_norms(family: str) -> None:
    """Layers that take a gate beside their input, and models that cast to the type of a norm's weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(PADDED[family](), dtype=torch.bfloat16)
    ids = torch.arange(3, 20)[None]
    before = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    names = {name for name, module in model.named_modules() if "Norm" in type(module).__name__}
    assert upcast_norms(model) == len(names)
    for name, parameter in model.named_parameters():
        expected = torch.float32 if name.rsplit(".", 1)[0] in names else torch.bfloat16
        assert parameter.dtype == expected, name
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    assert logits.dtype == before.dtype
    torch.testing.assert_close(logits, before, rtol=0.1, atol=0.1)


def test_recipe_key(tmp_path: Path) -> None:
    folder = chat_model(tmp_path)

    def loaded(**keys: Any) -> dict[str, torch.dtype]:
        spec = ModelSpec(path=str(folder), **keys)
        model = load_model(spec, locate(spec), torch.device("cpu"))
        assert model.config._attn_implementation == SDPA
        return {name: parameter.dtype for name, parameter in model.named_parameters()}

    plain = loaded(dtype="bfloat16")
    assert set(plain.values()) == {torch.bfloat16}
    upcast = loaded(dtype="bfloat16", upcast_layernorm=True)
    assert {name for name in upcast if upcast[name] == torch.float32} == {
        name for name in plain if "norm" in name
    }
    assert loaded(dtype="float32", upcast_layernorm=True) == loaded(dtype="float32")


def test_every_family_has_norms() -> None:
    """A class name that the rule overlooks would leave its weights 16-bit."""
    for family, config in (FAMILIES | PADDED).items():
        model = AutoModelForCausalLM.from_config(config(), dtype=torch.bfloat16)
        upcast_norms(model)
        missed = [
            name
            for name, parameter in model.named_parameters()
            if parameter.ndim == 1 and parameter.dtype != torch.float32 and ("norm" in name or ".ln" in name)
        ]
        assert not missed, family
