"""Models with images and sounds: what is trained is what transformers' own forward says of the same rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from luthier.data.encode import EncodeOptions
from luthier.methods import build_method
from luthier.model.checkpointing import checkpoint_layers
from luthier.model.logprobs import ModelPolicy, install_target_forward
from luthier.model.multimodal import hold_parts
from luthier.model.probes import inner_model
from luthier.model.reference import AdaptersOff, OtherModel
from luthier.model.rows import FLAT, Rows, Side
from luthier.model.selftest import build_with_rows
from luthier.recipe.schema import CheckpointingSpec, DpoSpec, LoraSpec, SftSpec
from luthier.stages import build_stage
from luthier.types import ModelError
from tests.multimodal import MULTIMODAL, some_pairs, some_rows, tiny_multimodal
from tests.reference import assert_same_gradients, gradients

OPTIONS = EncodeOptions(max_length=64, overflow="drop")
BETA = 0.3


def _trained_and_plain(family: str, side: Side) -> tuple[PreTrainedModel, PreTrainedModel]:
    model, plain = tiny_multimodal(family).train(), tiny_multimodal(family).train()
    install_target_forward(model, Rows(padded=True, side=side))
    return model, plain


def _assert_same_gradients(model: nn.Module, plain: nn.Module) -> None:
    """Of towers and projectors too, whose gradients are far above what is allowed."""
    theirs = gradients(plain)
    assert_same_gradients(gradients(model), theirs)
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    towers = [float(one.abs().max()) for name, one in theirs.items() if "tower" in name or "visual" in name]
    assert len(towers) > 20 and max(towers) > 1e-2 * largest


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", sorted(MULTIMODAL))
def test_sft_is_transformers_loss_with_labels(family: str, side: Side) -> None:
    """Rows with one picture, none and two: the sum of the losses of each row alone, and all gradients."""
    model, plain = _trained_and_plain(family, side)
    rows = some_rows(family)
    stage = build_stage(SftSpec(type="sft"), OPTIONS)
    term = stage.loss(ModelPolicy(model), rows.batch(), {}).terms["loss"]
    term.total.backward()
    expected = torch.zeros(())
    for inputs in rows.alone():
        expected = expected + plain(**inputs).loss * (inputs["labels"] != -100).sum()
    expected.backward()
    torch.testing.assert_close(term.total, expected, rtol=1e-5, atol=1e-5)
    assert int(term.weight) == 12
    _assert_same_gradients(model, plain)


@pytest.mark.parametrize("family", ["qwen2.5-vl", "gemma3"])
def test_another_picture_is_another_loss(family: str) -> None:
    """What the tests above compare depends on the pictures, on their order, and on nothing of another row."""
    model, _ = _trained_and_plain(family, "right")
    with torch.no_grad():
        rows = some_rows(family)
        before = ModelPolicy(model.eval()).logprobs(rows.batch()).logprobs
        rows.pictures[0] = [type(one)(one.tokens, {**one.tensors}) for one in rows.pictures[0]]
        rows.pictures[0][0].tensors["pixel_values"] = -rows.pictures[0][0].tensors["pixel_values"]
        after = ModelPolicy(model).logprobs(rows.batch()).logprobs
    assert float((after - before)[:5].abs().max()) > 1e-3
    assert torch.equal(after[5:], before[5:])


@pytest.mark.parametrize("family", sorted(MULTIMODAL))
def test_text_alone_is_exact(family: str) -> None:
    model, plain = _trained_and_plain(family, "right")
    rows = some_rows(family)
    batch = rows.batch()
    only = type(rows)(family, rows.samples[1:2], [[]]).batch()
    assert batch.media and not only.media
    if "mm_token_type_ids" in batch.media:  # what a processor says of text alone
        only.media["mm_token_type_ids"] = torch.zeros_like(only.input_ids)
    loss = -ModelPolicy(model).logprobs(only).logprobs.sum()
    torch.testing.assert_close(loss, plain(**rows.alone()[1]).loss * 3, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2.5-vl", "llava"])
def test_dpo_is_the_formula_over_transformers_logits(family: str) -> None:
    """Both answers of a pair see its picture, by the policy and by the reference."""
    model, plain = _trained_and_plain(family, "right")
    reference, plain_reference = tiny_multimodal(family, seed=1), tiny_multimodal(family, seed=1)
    install_target_forward(reference, Rows(padded=True))
    batch, rows = some_pairs(family)
    stage = build_stage(DpoSpec(type="dpo", loss="sigmoid", beta=BETA), OPTIONS)
    policy = ModelPolicy(model, reference=OtherModel(reference))
    term = next(iter(stage.loss(policy, batch, {}).terms.values()))
    term.total.backward()
    with torch.no_grad():
        base = torch.stack([_log_likelihood(plain_reference, row) for row in rows])
    ratios = torch.stack([_log_likelihood(plain, row) for row in rows]) - base
    expected = -logsigmoid(BETA * (ratios[:2] - ratios[2:])).sum()
    expected.backward()
    torch.testing.assert_close(term.total, expected, rtol=1e-5, atol=1e-5)
    _assert_same_gradients(model, plain)


def _log_likelihood(model: nn.Module, row: dict[str, Any]) -> Tensor:
    labels = row["labels"][0, 1:]
    inputs = {name: value for name, value in row.items() if name != "labels"}
    logprobs = model(**inputs).logits[0, :-1].float().log_softmax(-1)
    return logprobs.gather(-1, labels.clamp(min=0)[:, None])[labels != -100].sum()


def test_the_base_below_adapters_sees_the_same_pictures() -> None:
    model = tiny_multimodal("qwen2.5-vl")
    hold_parts(model, ())
    adapted = build_method(LoraSpec(type="lora", rank=2)).apply(model)
    install_target_forward(inner_model(adapted), Rows(padded=True))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    batch, rows = some_pairs("qwen2.5-vl")
    policy = ModelPolicy(adapted, reference=AdaptersOff(adapted))
    said = policy.reference_logprobs(batch)
    plain = tiny_multimodal("qwen2.5-vl")
    expected = torch.stack([_log_likelihood(plain, row) for row in rows])
    sums = torch.stack([part.sum() for part in said.split([4, 4, 6, 6])])
    torch.testing.assert_close(sums, expected.detach(), rtol=1e-5, atol=1e-5)
    assert float((policy.logprobs(batch).logprobs.detach() - said).abs().max()) > 1e-3


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("parts", [None, ()])
def test_checkpointing_changes_no_gradient(parts: tuple[()] | None, reentrant: bool) -> None:
    """Nor does it send one into a frozen tower, whose activations would be kept for nothing."""
    found = []
    for checkpointed in (False, True):
        model = tiny_multimodal("qwen2.5-vl").train()
        hold_parts(model, parts)
        if checkpointed:
            checkpoint_layers(model, CheckpointingSpec(reentrant=reentrant))
        adapted = build_method(LoraSpec(type="lora", rank=2)).apply(model)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
                if "lora_A" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        install_target_forward(inner_model(adapted), Rows(padded=True))
        seen: list[Tensor] = []
        tower = inner_model(adapted).base_model.visual  # type: ignore[union-attr]
        handle = tower.merger.register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(output)
        )
        ModelPolicy(adapted).logprobs(some_rows("qwen2.5-vl").batch()).logprobs.sum().backward()
        handle.remove()
        assert seen[0].requires_grad == (parts == ())
        found.append(gradients(adapted))
    assert found[0].keys() == found[1].keys() and len(found[0]) >= 28
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_flat_rows_refuse_pictures() -> None:
    model = tiny_multimodal("llava")
    install_target_forward(model, FLAT)
    with pytest.raises(ModelError, match="images, films and sounds need padded rows"):
        ModelPolicy(model).logprobs(some_rows("llava").batch())


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_are_padded_and_proven(side: Side) -> None:
    """Where rows may have media nothing flat is tried, and the padded layout passes its test."""
    builds: list[bool] = []

    def build(own_attention: bool) -> nn.Module:
        builds.append(own_attention)
        return tiny_multimodal("qwen2.5-vl")

    rows: Rows = build_with_rows(build, "auto", side, media=True).luthier_rows  # type: ignore[assignment]
    assert builds == [True]
    assert rows.padded and rows.side == side and "towers of media" in rows.reason
    assert rows.tests["padded"].difference < 1e-5
