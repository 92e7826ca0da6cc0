"""Packed weights give the same numbers, and are put only where nothing else reads them."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from luthier.engine.hf import HfEngine
from luthier.engine.packed import PackedLinear, can_pack, pack_linears
from luthier.types import GenerationSettings
from tests.tiny import tiny_model

pytestmark = pytest.mark.skipif(
    not can_pack(nn.Linear(2, 2)), reason="this torch has no oneDNN, whose layout is tested"
)
IDS = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "phi", "opt"])
def test_logits_are_those_of_the_plain_weights(family: str) -> None:
    model, plain = tiny_model(family, "sdpa").eval(), tiny_model(family, "sdpa").eval()
    linears = sum(type(module) is nn.Linear for module in plain.modules())
    assert pack_linears(model) == linears
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == linears
    with torch.inference_mode():
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)


def test_answers_are_those_of_the_plain_weights() -> None:
    model, settings = tiny_model("llama", "sdpa").eval(), GenerationSettings(max_new_tokens=12)
    prompts = [[5, 9, 30], [7], [11, 12, 13, 14]]
    expected = [answer.ids for answer in HfEngine(model).generate(prompts, settings)]
    pack_linears(model)
    assert [answer.ids for answer in HfEngine(model).generate(prompts, settings)] == expected


def test_weights_that_an_adapter_reads_stay_as_they_are() -> None:
    model = get_peft_model(
        tiny_model("llama", "sdpa"), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    )
    model.eval()
    with torch.no_grad():
        expected = model(IDS).logits
        packed = pack_linears(model)
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert packed == 2 * 6 + 1
    assert all(
        type(module.base_layer) is nn.Linear for module in model.modules() if hasattr(module, "base_layer")
    )


def test_only_float32_on_a_cpu_is_packed() -> None:
    model = tiny_model("llama", "sdpa").bfloat16()
    assert not can_pack(model)
    assert pack_linears(model) == 0
