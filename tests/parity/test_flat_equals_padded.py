"""Packed = padded = one by one: loss and gradients of plain transformers, on tiny models and on a real one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from luthier.data.encode import EncodeOptions
from luthier.data.prepare import Preparation, prepare
from luthier.data.template import load_template
from luthier.model.load import load_tokenizer, locate
from luthier.model.logprobs import ModelPolicy, install_target_forward
from luthier.recipe.schema import DataSpec, ModelSpec, SftSpec
from luthier.stages import build_stage
from luthier.types import Sample
from tests.reference import assert_same_gradients, gradients, padded_rows, without_dropout
from tests.tiny import random_samples, tiny_model

STAGE = build_stage(SftSpec(), EncodeOptions(max_length=4096, overflow="drop"))
LENGTHS = (31, 7, 18, 1, 12)
Result = tuple[float, dict[str, Tensor]]


def zero_one(samples: Sequence[Sample]) -> list[Sample]:
    """Weights 0 or 1, which is what labels can say."""
    return [Sample(sample.input_ids, np.sign(sample.weights)) for sample in samples]


def packed(model: nn.Module, passes: Sequence[Sequence[Sample]]) -> Result:
    """Mean loss of all targets and its gradients, through flat passes whose sums are added."""
    batches = [STAGE.collate(samples) for samples in passes]
    weight = sum(STAGE.weight(batch)["loss"] for batch in batches)
    loss = 0.0
    model.zero_grad()
    for batch in batches:
        part = STAGE.loss(ModelPolicy(model), batch, {}).terms["loss"].total / weight
        part.backward()
        loss += float(part)
    return loss, gradients(model)


def padded(model: nn.Module, samples: Sequence[Sample]) -> Result:
    """The same by plain transformers: right-padded rows, labels, the model's own mean."""
    ids, mask, labels = padded_rows(samples)
    model.zero_grad()
    loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
    loss.backward()
    return float(loss), gradients(model)


CUTS: dict[str, Callable[[Sequence[Sample]], list[list[Sample]]]] = {
    "packed": lambda samples: [list(samples)],
    "one-by-one": lambda samples: [[sample] for sample in samples],
    "two-passes-backwards": lambda samples: [list(samples[::-1][:2]), list(samples[::-1][2:])],
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3-window", "phi"])
def test_tiny(family: str, attention: str, cut: str) -> None:
    samples = zero_one(random_samples(LENGTHS))
    flat, plain = (
        without_dropout(tiny_model(family, name)).train() for name in ("luthier_segments", attention)
    )
    assert isinstance(flat, PreTrainedModel)
    install_target_forward(flat)
    loss, actual = packed(flat, CUTS[cut](samples))
    expected_loss, expected = padded(plain, samples)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(actual, expected, relative=1e-5)


def real_rows(folder: Path, model: Path, cache: Path, count: int) -> list[Sample]:
    """The first rows of the demonstration data, as a run would train on them."""
    spec = DataSpec(
        train=("alpaca_en_demo", "identity"), directory=str(folder), max_samples=count, cache=str(cache)
    )
    source = ModelSpec(path=str(model))
    template = load_template(load_tokenizer(source, locate(source)), spec)
    how = Preparation(STAGE.encode, template, "conversation", {"stage": "sft"}, seed=0)
    return prepare(spec, how).train[:]


def padded_in_float64(model: PreTrainedModel, samples: Sequence[Sample]) -> Result:
    """The same in float64 from the logits on.

    transformers takes the logits to float32, and torch's float32 log_softmax over 49,152 tokens is off by 7e-6
    nats, always upwards: that alone moves gradients by 3e-5.
    """
    ids, mask, labels = padded_rows(samples)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert logits.dtype == torch.float64
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    return float(loss), {name: gradient.float() for name, gradient in gradients(model).items()}


@pytest.mark.slow
def test_real_model_and_rows(smollm2: Path, shared_data: Path, tmp_path: Path) -> None:
    """SmolLM2-135M, all of its parameters, on real rows of unequal length."""
    samples = sorted(real_rows(shared_data, smollm2, tmp_path, 12), key=len)[:8]
    assert len({len(sample) for sample in samples}) > 4

    def load(attention: str) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(
            smollm2, attn_implementation=attention, dtype=torch.float32
        )

    plain = load("sdpa")
    float32_loss, _ = padded(plain, zero_one(samples))
    plain.zero_grad()
    exact_loss, exact = padded_in_float64(plain.double(), zero_one(samples))
    del plain
    flat = load("luthier_segments")
    install_target_forward(flat)
    for cut in CUTS.values():
        loss, actual = packed(flat, cut(samples))
        assert loss == pytest.approx(float32_loss, rel=1e-5)
        assert loss == pytest.approx(exact_loss, rel=2e-6)
        assert_same_gradients(actual, exact, relative=1e-5)
