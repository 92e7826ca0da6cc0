"""Packed weights give the same numbers, and are put only where nothing else reads them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from luthier.engine.hf import HfEngine
from luthier.engine.packed import PackedCopies, PackedLinear, can_pack, copies_for, pack_linears
from luthier.engine.protocol import BASE
from luthier.methods.fused import fuse_lora
from luthier.model.logprobs import install_target_forward
from luthier.types import Generation, GenerationSettings, ModelError, Request
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


def in_training(**changes: Any) -> Any:
    """A model with LoRA as training has it: fused layers, a head that answers targets, every module training."""
    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "lora_dropout": 0.5}
    model = get_peft_model(tiny_model("llama"), LoraConfig(**(settings | changes)))
    fuse_lora(model)
    install_target_forward(model.get_base_model())
    return model.train()


def requests_of(prompts: list[list[int]]) -> list[Request]:
    settings = GenerationSettings(
        max_new_tokens=10, temperature=0.8, logprobs=0, logprobs_of="sampling", stop_ids=(1, 2, 3)
    )
    return [Request(tuple(prompt), replace(settings, seed=seed)) for seed, prompt in enumerate(prompts * 3)]


def sampled(model: Any, **how: Any) -> dict[int, Generation]:
    return dict(HfEngine(model, rows=5, **how).answers(requests_of([[5, 9, 30], [7, 8, 9, 10, 11]])))


def assert_same_answers(mine: dict[int, Generation], theirs: dict[int, Generation]) -> None:
    assert mine.keys() == theirs.keys()
    for number, answer in mine.items():
        assert answer.ids == theirs[number].ids
        pairs = zip(answer.choices, theirs[number].choices, strict=True)
        assert all(a.logprob == pytest.approx(b.logprob, abs=1e-5) for a, b in pairs)


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"bias": "all"}, {"use_rslora": True}], ids=str)
def test_a_model_in_training_answers_from_packed_copies_as_from_its_own(changes: dict[str, Any]) -> None:
    """Its parameters, modules and modes are afterwards what they were."""
    model = in_training(**changes)
    next(model.base_model.model.model.layers.children()).eval()
    before = {name: (module, module.training) for name, module in model.named_modules()}
    values = {name: value.clone() for name, value in model.state_dict().items()}
    expected = sampled(model)
    assert_same_answers(sampled(model, pack=True), expected)
    after = {name: (module, module.training) for name, module in model.named_modules()}
    assert before == after
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert any(not module.training for module in model.modules())


def test_the_copies_are_what_the_model_computes_with() -> None:
    """All layers but the embedding; and those of an adapter that is more than a sum are left."""
    assert len(PackedCopies(in_training().get_base_model())) == 15
    assert len(PackedCopies(in_training(use_dora=True).get_base_model())) == 1
    model = in_training()
    copies = PackedCopies(model.get_base_model())
    expected = sampled(model)
    with torch.no_grad():
        for parameter in (one for name, one in model.named_parameters() if "lora" in name):
            parameter.zero_()
    with copies.in_place():
        assert_same_answers(sampled(model), expected)
    assert sampled(model) != expected


def test_copies_are_made_anew_for_every_call() -> None:
    model = in_training()
    engine = HfEngine(model, rows=5, pack=True)
    first = dict(engine.answers(requests_of([[5, 9, 30]])))
    with torch.no_grad():
        for parameter in (one for name, one in model.named_parameters() if "lora_B" in name):
            parameter.neg_()
    second = dict(engine.answers(requests_of([[5, 9, 30]])))
    assert first != second
    assert_same_answers(second, dict(HfEngine(model, rows=5).answers(requests_of([[5, 9, 30]]))))


def test_the_base_answers_without_the_adapter_beside_copies_that_have_it() -> None:
    model = in_training()
    requests = [replace(request, adapter=BASE) for request in requests_of([[5, 9, 30]])]
    expected = dict(HfEngine(model, rows=5).answers(requests))
    assert_same_answers(dict(HfEngine(model, rows=5, pack=True).answers(requests)), expected)
    assert expected != dict(HfEngine(model, rows=5).answers(requests_of([[5, 9, 30]])))


def test_without_the_memory_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = in_training().get_base_model()
    assert copies_for(model) is not None
    free = SimpleNamespace(available=10_000)
    monkeypatch.setattr("luthier.engine.packed.psutil.virtual_memory", lambda: free)
    assert copies_for(model) is None
    assert copies_for(model.bfloat16()) is None


def test_adapters_to_choose_from_are_not_packed() -> None:
    with pytest.raises(ModelError, match="copies of the weights are of one adapter"):
        HfEngine(in_training(), adapters=("default",), pack=True)
