"""What the start-up self-test lets through, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BertConfig

from luthier.model import attention, logprobs
from luthier.model.attention import NotIsolatedError
from luthier.model.load import ModelSource, load_model
from luthier.model.logprobs import chosen_rows, install_target_forward
from luthier.model.selftest import (
    LENGTHS,
    build_with_rows,
    require_isolation,
    run_self_test,
    two_segments,
)
from luthier.recipe.schema import ModelSpec
from luthier.types import IGNORE_INDEX, ModelError
from tests.padded import PADDED, builder, own_model, padded_model
from tests.tiny import FAMILIES, VOCAB, tiny_model


def taught(family: str) -> Any:
    model = tiny_model(family)
    install_target_forward(model)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_known_families_pass(family: str) -> None:
    result = require_isolation(taught(family))
    assert result.attention_calls == 2 * 3  # two layers, three flat passes
    assert result.difference < 1e-5
    assert result.leak == result.reach == result.lookahead == 0.0


@pytest.mark.parametrize("family", ["bloom", "mamba", "rwkv"])
def test_models_that_never_ask_are_found(family: str) -> None:
    model = own_model(family, attention.SDPA)
    install_target_forward(model)
    with pytest.raises(NotIsolatedError, match="never calls the attention function"):
        require_isolation(model)


@pytest.mark.parametrize("family", ["jamba", "bamba", "lfm2"])
def test_hybrids_leak_past_the_attention(family: str) -> None:
    """Their attention layers are isolated; the recurrent or convolutional ones are not."""
    model = own_model(family, attention.SDPA)
    install_target_forward(model)
    with pytest.raises(NotIsolatedError, match="a change in one segment moved the other") as error:
        require_isolation(model)
    assert type(model).__name__ in str(error.value)
    assert run_self_test(model).attention_calls > 0


@pytest.mark.parametrize("arithmetic", [None, torch.bfloat16])
@pytest.mark.parametrize("family", ["jamba", "lfm2"])
def test_a_small_leak_is_found(family: str, arithmetic: torch.dtype | None) -> None:
    """Fresh models whose weights are so small that what leaks is less than rounding may be."""
    torch.manual_seed(0)
    config = PADDED[family]()
    config.initializer_range = 0.01
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.SDPA)
    install_target_forward(model)
    result = run_self_test(model)
    assert result.leak < 1e-4 and result.difference < 1e-3
    assert result.reach > 1e-6
    with pytest.raises(NotIsolatedError, match="of its gradient goes there"):
        require_isolation(model, arithmetic)


@pytest.mark.parametrize("family", ["gpt-oss", "mpt", "qwen3-next"])
def test_models_that_refuse_a_flat_row(family: str) -> None:
    model = own_model(family, attention.SDPA)
    install_target_forward(model)
    with pytest.raises(NotIsolatedError, match=r"cannot compute a flat row \(.+\)"):
        require_isolation(model)


def test_model_with_a_closed_table_of_attentions(tmp_path: Path) -> None:
    own_model("falcon").save_pretrained(tmp_path)
    spec, source = ModelSpec(path=str(tmp_path)), ModelSource(str(tmp_path), local=True)
    with pytest.raises(NotIsolatedError, match=r"FalconForCausalLM does not let its attention be chosen"):
        load_model(spec, source, torch.device("cpu"))
    model = load_model(spec, source, torch.device("cpu"), own_attention=True)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", PADDED)
def test_padded_rows_are_chosen(family: str, side: str) -> None:
    if (family, side) == ("rwkv", "left"):
        with pytest.raises(
            ModelError, match=r"never calls.*; and .*padding on the left.*model.padding_side=right"
        ):
            build_with_rows(builder(family), "auto", "left")
        return
    model = padded_model(family, side)
    rows = chosen_rows(model)
    assert (rows.padded, rows.side) == (True, side)
    assert rows.reason
    assert set(rows.tests) == {"padded"}
    assert rows.tests["padded"].difference < 1e-5
    assert rows.tests["padded"].leak == rows.tests["padded"].reach == rows.tests["padded"].lookahead == 0.0


@pytest.mark.parametrize(("wanted", "padded"), [("auto", False), ("flat", False), ("padded", True)])
def test_wish_on_a_model_that_can_do_both(wanted: str, padded: bool) -> None:
    built: list[bool] = []

    def build(own_attention: bool) -> nn.Module:
        built.append(own_attention)
        return tiny_model("llama", "sdpa" if own_attention else attention.SDPA)

    rows = chosen_rows(build_with_rows(build, wanted, "right"))
    assert built == [padded]
    assert rows.padded is padded
    assert rows.record()["layout"] == ("padded" if padded else "flat")
    assert set(rows.tests) == {"padded" if padded else "flat"}


def test_flat_rows_are_not_forced_on_a_model_that_leaks() -> None:
    with pytest.raises(ModelError, match=r"MambaForCausalLM never calls.*model.rows=flat is not exact here"):
        build_with_rows(builder("mamba"), "flat", "right")


def test_unknown_logit_rule_is_refused_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "logits_transform", lambda config: lambda logits: logits)

    def build(own_attention: bool) -> nn.Module:
        return tiny_model("granite-scaled", "sdpa" if own_attention else attention.SDPA)

    with pytest.raises(ModelError, match=r"two-segment self-test.*; and .*self-test of padded rows"):
        build_with_rows(build, "auto", "right")


def test_leak_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention that is called, but sees the whole row."""

    def leaky(
        q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, max_length: int | None, **options: Any
    ) -> Tensor:
        return attention.sdpa_segments(q, k, v, bounds[[0, -1]], max_length, **options)

    model = taught("llama")
    assert run_self_test(model).leak == 0.0
    monkeypatch.setattr(attention.KERNELS[attention.SDPA], "_kernel", leaky)
    result = run_self_test(model)
    assert result.leak > 0.1
    assert result.difference > 0.1
    with pytest.raises(ModelError, match="failed the two-segment self-test"):
        require_isolation(model)


def test_constant_leak_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong numbers that do not depend on the other segment: the comparison finds what the exchange cannot."""

    def off(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
        return attention.sdpa_segments(q, k, v, *args, **options) * 1.5

    model = taught("llama")
    monkeypatch.setattr(attention.KERNELS[attention.SDPA], "_kernel", off)
    assert run_self_test(model).leak == 0.0
    with pytest.raises(ModelError, match="failed the two-segment self-test"):
        require_isolation(model)


@pytest.mark.parametrize("family", ["granite-scaled", "cohere-scaled", "gemma3-window"])
def test_unknown_logit_rule_is_refused(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = taught(family)
    require_isolation(model)
    monkeypatch.setattr(logprobs, "logits_transform", lambda config: lambda logits: logits)
    result = run_self_test(model)
    assert result.leak == 0.0
    with pytest.raises(ModelError, match="failed the two-segment self-test"):
        require_isolation(model)


def test_not_a_number_is_refused() -> None:
    def build(own_attention: bool) -> nn.Module:
        model = tiny_model("llama", "sdpa" if own_attention else attention.SDPA)
        with torch.no_grad():
            next(model.parameters())[:] = float("nan")
        return model

    for wanted in ("auto", "flat", "padded"):
        with pytest.raises(ModelError, match="LlamaForCausalLM answers with NaN"):
            build_with_rows(build, wanted, "right")


@pytest.mark.parametrize("decoder", [False, True])
def test_encoders_are_refused(decoder: bool) -> None:
    """BERT loads as a causal language model. As a decoder it is one, but has more between backbone and head."""
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        is_decoder=decoder,
    )

    def build(own_attention: bool) -> nn.Module:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa" if own_attention else attention.SDPA
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4.0)
        return model

    message = r"^BertLMHeadModel looks ahead.*this is an encoder"
    if decoder:
        message = r"BertLMHeadModel failed the self-test of padded rows"
    for wanted in ("auto", "padded"):
        with pytest.raises(ModelError, match=message):
            build_with_rows(build, wanted, "right")


@pytest.mark.parametrize("training", [False, True])
def test_mode_is_kept(training: bool) -> None:
    model = taught("llama").train(training)
    require_isolation(model)
    assert model.training is training


def test_two_segments() -> None:
    batch = two_segments(VOCAB, torch.device("cpu"))
    first, second = LENGTHS
    assert batch.cu_seqlens.tolist() == [0, first, first + second]
    assert batch.position_ids[0].tolist() == [*range(first), *range(second)]
    ids = batch.input_ids[0].tolist()
    assert batch.targets.tolist() == [*ids[1:first], IGNORE_INDEX, *ids[first + 1 :], IGNORE_INDEX]
