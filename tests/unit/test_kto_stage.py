"""The stage kto: its recipe, batches, weights and what it observes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from luthier.data.partners import Mismatched
from luthier.recipe.stage import KtoSpec
from luthier.stages import build_stage
from luthier.types import Sample
from tests.preference import OPTIONS, gradients_of, made_models, made_sample, random_answers, step_loss


def weights_of(stage: Any, batch: Any) -> dict[str, float]:
    return {name: float(weight) for name, weight in stage.weight(batch).items()}


def test_batches() -> None:
    """The rows are the samples with their own answers; beside them the same prompts with others'."""
    stage = build_stage(KtoSpec(), OPTIONS, share_prompts=True)
    assert (stage.kind, stage.needs_reference, stage.needs_mismatched) == ("feedback", True, True)
    assert not stage.share_prompts
    samples = [made_sample([[5, 6, 7], [10, 11]], 0, 1.0), made_sample([[8], [12, 13, 14]], 1, 0.0)]
    batch = stage.collate(Mismatched(samples)[:])
    assert batch.input_ids.tolist() == [[5, 6, 7, 10, 11, 8, 12, 13, 14]]
    assert batch.labels is not None
    assert batch.labels.tolist() == [1, 0]
    assert batch.mismatched is not None
    assert batch.mismatched.input_ids.tolist() == [[5, 6, 7, 12, 13, 14, 8, 10, 11]]
    other = build_stage(KtoSpec(loss="apo_zero_unpaired"), OPTIONS)
    assert not other.needs_mismatched
    assert other.collate(samples).mismatched is None


def test_weights() -> None:
    labels = [True, False, True, True]
    for sft_weight, expected in ((0.0, {"loss": 4.0}), (0.5, {"preference": 4.0, "sft": 3.0})):
        stage = build_stage(KtoSpec(sft_weight=sft_weight), OPTIONS)
        batch = stage.collate(random_answers(labels))
        assert weights_of(stage, batch) == expected
        assert stage.terms == tuple(expected)
        terms = stage.loss(made_models().handle(), batch, {}).terms
        assert {name: float(term.weight) for name, term in terms.items()} == expected


def test_a_batch_alone_is_a_step() -> None:
    stage, policy = build_stage(KtoSpec(sft_weight=0.2), OPTIONS), made_models().handle()
    batch = stage.collate(random_answers([True, False, True], seed=5))
    with torch.no_grad():
        observed = stage.observe(policy, [batch])
        assert float(observed["mismatched"].mean()) > 0
        seen, alone = stage.loss(policy, batch, observed), stage.loss(policy, batch, {})
    for name, term in seen.terms.items():
        assert float(alone.terms[name].total) == pytest.approx(float(term.total), rel=1e-6)


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_a_process_with_nothing_to_do(loss: str) -> None:
    """One token without branches: no rows, no weight, a loss of 0 with gradients of 0; the other model runs, too."""
    stage = build_stage(KtoSpec.model_validate({"loss": loss, "sft_weight": 0.5}), OPTIONS)
    models = made_models()
    policy = models.handle()
    batch = stage.collate([Sample(np.array([5], np.int32), np.zeros(1, np.float32))])
    assert set(weights_of(stage, batch).values()) == {0.0}
    assert (batch.mismatched is not None) == (loss == "kto")
    with torch.no_grad():
        observed = stage.observe(policy, [batch])
        beside = stage.observe(policy, [batch, stage.collate(random_answers([True, False]))])
    for seen in (observed, beside):
        loss_sum = stage.loss(policy, batch, seen)
        total = torch.stack([term.total for term in loss_sum.terms.values()]).sum()
        total.backward()  # type: ignore[no-untyped-call]
        assert float(total.detach()) == 0
        assert all(float(term.total) == 0 == float(term.weight) for term in loss_sum.metrics.values())
        assert not any(bool(gradient.any()) for gradient in gradients_of(models.policy).values())


def test_steps_of_one_label_or_row() -> None:
    """No NaN where a term or a metric has no row; the likelihood of no desirable row is 0."""
    stage, models = build_stage(KtoSpec(sft_weight=0.5), OPTIONS), made_models()
    for labels in ([True, True], [False, False], [False], [True]):
        loss = step_loss(stage, models.handle(), [stage.collate(random_answers(labels))])
        assert bool(loss.isfinite())
        assert all(bool(gradient.isfinite().all()) for gradient in gradients_of(models.policy).values())


def test_no_gradient_through_the_divergence() -> None:
    """The answers of others have none, whatever they are."""
    stage, models = build_stage(KtoSpec(), OPTIONS), made_models()
    batch = stage.collate(random_answers([True, False, True], seed=5))
    observed = {"mismatched": torch.full((3,), 0.7)}
    stage.loss(models.handle(), batch, observed).terms["loss"].total.backward()  # type: ignore[no-untyped-call]
    expected = gradients_of(models.policy)
    batch.mismatched = None
    stage.loss(models.handle(), batch, observed).terms["loss"].total.backward()  # type: ignore[no-untyped-call]
    actual = gradients_of(models.policy)
    assert all(bool(torch.equal(actual[name], gradient)) for name, gradient in expected.items())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"loss": "bco"}, "loss"),
        ({"beta": 0}, "beta"),
        ({"desirable_weight": -1}, "desirable_weight"),
        ({"desirable_weight": 0, "undesirable_weight": 0}, "no row has a loss"),
    ],
)
def test_refused(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        KtoSpec.model_validate(spec)
