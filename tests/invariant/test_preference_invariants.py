"""How the rows of a step are cut into passes, and in which order, changes neither its loss nor its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, overload

import pytest
import torch
from torch import Tensor

from luthier.recipe.stage import DpoSpec, KtoSpec, PairLossName
from luthier.stages import build_stage
from luthier.types import Batch, Sample, Stage
from tests.preference import (
    OPTIONS,
    Models,
    gradients_of,
    made_models,
    random_answers,
    random_pairs,
    step_loss,
)
from tests.reference import assert_same_gradients
from tests.tiny import tiny_model
from tests.training import assert_same_weights, history, recipe_of, trainer_of, weights

CUTS = [
    [[0], [1], [2], [3], [4], [5], [6]],
    [[5, 2], [0, 6, 3], [1, 4]],
    [[6, 5, 4, 3, 2, 1, 0]],
]


@pytest.fixture(scope="module")
def models() -> Models:
    return made_models()


class Lazy(Sequence[Batch]):
    """Passes that are collated anew whenever they are read, as those of an evaluation are."""

    def __init__(self, stage: Stage, passes: Sequence[Sequence[Sample]]) -> None:
        self.stage, self.passes = stage, passes

    def __len__(self) -> int:
        return len(self.passes)

    @overload
    def __getitem__(self, i: int) -> Batch: ...
    @overload
    def __getitem__(self, i: slice) -> list[Batch]: ...
    def __getitem__(self, i: int | slice) -> Batch | list[Batch]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        return self.stage.collate(self.passes[i]).to("cpu")


def assert_cuts_agree(stage: Stage, models: Models, samples: list[Sample]) -> None:
    assert len(samples) == 7
    policy = models.handle()
    whole = step_loss(stage, policy, [stage.collate(samples)])
    expected = gradients_of(models.policy)
    for cut in CUTS:
        loss = step_loss(stage, policy, Lazy(stage, [[samples[i] for i in rows] for rows in cut]))
        torch.testing.assert_close(loss, whole, rtol=1e-5, atol=1e-6)
        assert_same_gradients(gradients_of(models.policy), expected)


EXTRA: dict[str, dict[str, Any]] = {
    "exo_pair": {"label_smoothing": 0.1},
    "aot": {"label_smoothing": 0.1},
    "sigmoid": {"ld_alpha": 0.4, "sft_weight": 0.5},
}


@pytest.mark.parametrize("loss", get_args(PairLossName))
def test_pairs(loss: str, models: Models) -> None:
    spec = DpoSpec.model_validate({"loss": loss, "beta": 0.3, **EXTRA.get(loss, {})})
    assert_cuts_agree(build_stage(spec, OPTIONS), models, random_pairs(7))


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired", "kto_pair", "bco_pair"])
def test_a_pair_twice_in_a_step(loss: str, models: Models) -> None:
    """One row that the step holds three times, and one whose tokens another row has, too."""
    samples = random_pairs(7)
    samples[3] = samples[5] = samples[0]
    samples[6] = replace(samples[1], index=6)
    spec = DpoSpec.model_validate({"loss": loss, "beta": 0.3})
    assert_cuts_agree(build_stage(spec, OPTIONS), models, samples)


def test_the_step_matters(models: Models) -> None:
    """The losses with a statistic are not sums over rows: each row alone as a step gives another loss."""
    for loss in ("aot", "aot_unpaired", "kto_pair", "bco_pair"):
        stage, samples = (
            build_stage(DpoSpec.model_validate({"loss": loss, "beta": 0.3}), OPTIONS),
            random_pairs(7),
        )
        policy = models.handle()
        with torch.no_grad():
            whole = stage.loss(policy, stage.collate(samples), {}).terms["loss"].total
            alone = [stage.loss(policy, stage.collate([one]), {}).terms["loss"].total for one in samples]
        assert abs(float(whole - torch.stack(alone).sum())) > 1e-3


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("sft_weight", [0.0, 0.5])
def test_marked_answers(loss: str, sft_weight: float, models: Models) -> None:
    spec = KtoSpec.model_validate(
        {"loss": loss, "beta": 0.3, "sft_weight": sft_weight, "undesirable_weight": 1.5}
    )
    labels = [True, False, False, True, True, False, True]
    samples = random_answers(labels, seed=5)
    stage = build_stage(spec, OPTIONS)
    if loss == "kto":
        with torch.no_grad():
            observed = stage.observe(models.handle(), [stage.collate(samples)])
        assert float(observed["mismatched"].mean()) > 0
    assert_cuts_agree(stage, models, samples)


def test_metrics_add_up(models: Models) -> None:
    """Means over the passes of a step = those of the step at once."""

    def means(stage: Stage, passes: list[list[Sample]]) -> dict[str, float]:
        policy, batches = models.handle(), [stage.collate(samples) for samples in passes]
        sums: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            observed = stage.observe(policy, batches)
            for batch in batches:
                for name, term in stage.loss(policy, batch, observed).metrics.items():
                    sums.setdefault(name, []).append(torch.stack((term.total, term.weight)))
        totals = {name: torch.stack(parts).sum(0) for name, parts in sums.items()}
        return {name: float(total / weight) for name, (total, weight) in totals.items()}

    pairs, marked = random_pairs(5), random_answers([True, False, False, True, True])
    losses = {"sigmoid": 1.0, "kto_pair": 0.5, "orpo": 2.0}
    spec = DpoSpec.model_validate({"loss": losses, "sft_weight": 0.1})
    for stage, samples in ((build_stage(spec, OPTIONS), pairs), (build_stage(KtoSpec(), OPTIONS), marked)):
        whole = means(stage, [samples])
        assert means(stage, [samples[:1], samples[1:3], samples[3:]]) == pytest.approx(
            whole, rel=1e-4, abs=1e-5
        )
        assert len(whole) >= 5


def test_trainer(tmp_path: Path) -> None:
    """Through the trainer, with two terms: four rows at once = one row four times."""
    pairs, ways = random_pairs(16), [(4, 1), (1, 4)]
    stage = {"type": "dpo", "loss": "simpo", "beta": 2.0, "sft_weight": 0.3}
    start, runs = weights(tiny_model("llama")), []
    for rows, accumulation in ways:
        train = {"rows_per_device": rows, "accumulation": accumulation, "max_steps": 3}
        recipe = recipe_of(
            tmp_path / str(rows),
            train=train,
            stage=stage,
            method={"type": "full"},
            optim={"type": "sgd", "lr": 0.05},
        )
        trainer = trainer_of(recipe, tiny_model("llama"), pairs, {"held": random_pairs(5, seed=9)})
        trainer.train()
        report = trainer.evaluate()
        assert report["eval_loss"] == pytest.approx(
            report["eval_preference_loss"] + report["eval_sft_loss"], rel=1e-6
        )
        assert 0 <= report["eval_rewards/accuracies"] <= 1
        runs.append((trainer, report))
    (one, first), (other, second) = runs
    for name in ("loss", "preference_loss", "sft_loss", "rewards/margins", "nll_loss"):
        assert len(history(one, name)) == 3
        assert history(other, name) == pytest.approx(history(one, name), rel=1e-4)
    assert second["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-4)
    assert_same_weights(weights(one.model), weights(other.model), start, 1e-4)
