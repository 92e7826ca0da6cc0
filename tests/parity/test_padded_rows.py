"""Padded rows = one by one = flat: losses and gradients, on families that flat rows would mix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from luthier.data.encode import EncodeOptions
from luthier.methods.fused import fuse_lora
from luthier.model.logprobs import ModelPolicy, install_target_forward
from luthier.model.rows import FLAT, Rows
from luthier.recipe.schema import SftSpec
from luthier.stages import build_stage
from luthier.types import Sample
from tests.padded import own_model, padded_model
from tests.reference import assert_same_gradients, gradients, train_all, without_dropout
from tests.tiny import random_samples, tiny_model

STAGE = build_stage(SftSpec(), EncodeOptions(max_length=4096, overflow="drop"))
LENGTHS = (19, 7, 12, 1, 31)
Result = tuple[float, dict[str, Tensor]]

EXACT = ["mamba", "mamba2", "bloom", "falcon", "jamba", "bamba", "qwen3-next", "gpt-oss"]


def through_stage(model: nn.Module, passes: Sequence[Sequence[Sample]]) -> Result:
    """Weighted mean loss and its gradients, as the trainer takes them: sums of passes over the whole weight."""
    batches = [STAGE.collate(samples) for samples in passes]
    weight = sum(STAGE.weight(batch)["loss"] for batch in batches)
    loss = 0.0
    model.zero_grad()
    for batch in batches:
        part = STAGE.loss(ModelPolicy(model), batch, {}).terms["loss"].total / weight
        part.backward()
        loss += float(part.detach())
    return loss, gradients(model)


def one_by_one(model: nn.Module, samples: Sequence[Sample]) -> Result:
    """The same by plain transformers: each sample alone, whole logits, no padding anywhere."""
    model.zero_grad()
    total_weight = sum(float(sample.weights[1:].sum()) for sample in samples)
    loss = 0.0
    for sample in samples:
        ids = torch.tensor(sample.input_ids.tolist())[None]
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
        logprobs = logits[:-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        part = -(logprobs * torch.tensor(sample.weights[1:].tolist())).sum() / total_weight
        part.backward()
        loss += float(part.detach())
    return loss, gradients(model)


def with_lora(model: Any) -> PeftModel:
    """Adapters that already do something on linear layers that PEFT lets be adapted; the fused forward is on."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(("_proj", "query_key_value", "dense_4h_to_h"))
    ]
    targets = [name for name in names if not name.endswith("out_proj")]  # PEFT refuses Mamba's
    torch.manual_seed(3)
    peft_model = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules=targets))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    assert fuse_lora(peft_model) > 0
    return peft_model


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", EXACT)
def test_padded_equals_one_by_one(family: str, side: str) -> None:
    samples = random_samples(LENGTHS)
    padded, plain = (
        without_dropout(train_all(model)) for model in (padded_model(family, side), own_model(family))
    )
    assert padded.luthier_rows.padded
    expected_loss, expected = one_by_one(plain, samples)
    for passes in ([samples], [samples[:2], samples[2:]]):
        loss, actual = through_stage(padded, passes)
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert_same_gradients(actual, expected, relative=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["mamba", "bloom", "falcon", "bamba"])
def test_fused_adapters_on_padded_rows(family: str, side: str) -> None:
    """LoRA's fused product over rows (S, L, D) beside PEFT's own over one row at a time."""
    samples = random_samples(LENGTHS)
    fused = with_lora(padded_model(family, side)).train()
    plain = with_lora(own_model(family)).train()
    for model in (fused, plain):
        without_dropout(model)
    expected_loss, expected = one_by_one(plain, samples)
    loss, actual = through_stage(fused, [samples])
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(actual, expected, relative=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3-window", "gpt2", "opt"])
def test_padded_equals_flat(family: str) -> None:
    """Families that need no padding give the same both ways."""
    samples = random_samples(LENGTHS)
    flat, right, left = (
        without_dropout(train_all(tiny_model(family, name))) for name in ("luthier_segments", "sdpa", "eager")
    )
    for model, rows in ((flat, FLAT), (right, Rows(padded=True)), (left, Rows(padded=True, side="left"))):
        install_target_forward(model, rows)
    expected_loss, expected = through_stage(flat, [samples])
    for padded in (right, left):
        loss, actual = through_stage(padded, [samples])
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert_same_gradients(actual, expected, relative=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_pass_without_targets_has_no_gradient(side: str) -> None:
    """The dummy of a process that has nothing to do."""
    model = without_dropout(train_all(padded_model("bloom", side)))
    samples = [Sample(sample.input_ids, sample.weights * 0) for sample in random_samples((5, 9))]
    loss = STAGE.loss(ModelPolicy(model), STAGE.collate(samples), {}).terms["loss"].total
    loss.backward()
    assert float(loss) == 0.0
    assert all(float(gradient.abs().max()) == 0.0 for gradient in gradients(model).values())
