"""What the start-up self-test lets through, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig, MambaConfig, PreTrainedConfig

from luthier.model import attention, logprobs
from luthier.model.load import ModelSource, load_model
from luthier.model.logprobs import install_target_forward
from luthier.model.selftest import LENGTHS, require_isolation, run_self_test, two_segments
from luthier.recipe.schema import ModelSpec
from luthier.types import IGNORE_INDEX, ModelError
from tests.tiny import FAMILIES, VOCAB, tiny_model

BLOOM = BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)
MAMBA = MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=8)


def taught(family: str) -> Any:
    model = tiny_model(family)
    install_target_forward(model)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_known_families_pass(family: str) -> None:
    result = require_isolation(taught(family))
    assert result.attention_calls == 2 * 2  # two layers, two flat passes
    assert result.difference < 1e-5
    assert result.leak == 0.0


@pytest.mark.parametrize("config", [BLOOM, MAMBA], ids=["bloom", "mamba"])
def test_models_that_never_ask_are_refused(config: PreTrainedConfig) -> None:
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.SDPA)
    install_target_forward(model)
    with pytest.raises(ModelError, match="never calls the attention function"):
        require_isolation(model)


def test_model_with_a_closed_table_of_attentions_is_refused(tmp_path: Path) -> None:
    config = FalconConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"FalconForCausalLM.*does not let its attention be chosen"):
        load_model(ModelSpec(path=str(tmp_path)), ModelSource(str(tmp_path), local=True), torch.device("cpu"))


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
    model = taught("llama")
    with torch.no_grad():
        next(model.parameters())[:] = float("nan")
    with pytest.raises(ModelError, match="failed the two-segment self-test"):
        require_isolation(model)


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
