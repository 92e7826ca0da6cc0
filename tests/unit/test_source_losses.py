"""The loss of each training set: the sum of what its own rows add, and of nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from luthier.recipe.schema import KtoSpec, PtSpec, RmSpec, SftSpec
from luthier.recipe.stage import DpoSpec
from luthier.stages import build_stage
from luthier.trainer.sources import source_terms
from luthier.types import Sample
from tests.preference import OPTIONS, Models, made_models, random_answers, random_pairs
from tests.tiny import random_samples

SETS = ("first", "second", "absent")


@pytest.fixture(scope="module")
def models() -> Models:
    return made_models()


class Scores:
    """A reward model that scores a row by its last position."""

    def scores(self, batch: Any) -> torch.Tensor:
        last_R = batch.cu_seqlens[1:].long()[batch.rows] - 1
        place_R: torch.Tensor = batch.position_ids[0, last_R]
        return 0.1 * (1 + place_R.float())


def of_two_sets(samples: list[Sample]) -> list[Sample]:
    return [replace(sample, source=SETS[i % 3 == 0]) for i, sample in enumerate(samples)]


STAGES: dict[str, Any] = {
    "pt": PtSpec(),
    "sft": SftSpec(),
    "smoothed": SftSpec(label_smoothing=0.3),
    "dft": SftSpec(loss="dft"),
    "eaft": SftSpec(loss="eaft"),
    "asft": SftSpec(loss="asft"),
    "dpo": DpoSpec(),
    "dpo with sft": DpoSpec(loss={"sigmoid": 1.0, "ipo": 0.5}, sft_weight=0.7),
    "kto": KtoSpec(loss="apo_zero_unpaired"),
    "rm": RmSpec(center=0.1),
}


@pytest.mark.parametrize("name", STAGES)
def test_each_set_has_the_loss_that_its_rows_have_alone(name: str, models: Models) -> None:
    spec = STAGES[name]
    stage = build_stage(spec, OPTIONS)
    policy: Any = Scores() if name == "rm" else models.handle()
    if name.startswith(("dpo", "rm")):
        samples = of_two_sets(random_pairs(7))
    elif name == "kto":
        samples = of_two_sets(random_answers([True, False, True, True, False]))
    else:
        samples = of_two_sets(random_samples((9, 21, 4, 7, 5)))
    batch = stage.collate(samples)
    with torch.no_grad():
        whole = stage.loss(policy, batch, {})
        terms = source_terms(batch, whole, SETS)
        assert list(terms) == [f"loss/{name}" for name in SETS]
        assert float(terms["loss/absent"].weight) == float(terms["loss/absent"].total) == 0
        main = list(whole.terms.values()) if name != "kto" else [next(iter(whole.terms.values()))]
        total = sum(float(term.total) for term in main)
        assert sum(float(term.total) for term in terms.values()) == pytest.approx(total, rel=1e-5)
        assert sum(float(term.weight) for term in terms.values()) == float(main[0].weight)
        for source in SETS[:2]:
            own = [sample for sample in samples if sample.source == source]
            alone = stage.loss(policy, stage.collate(own), {})
            kept = list(alone.terms.values())[: len(main)]
            expected = sum(float(term.total) for term in kept)
            assert float(terms[f"loss/{source}"].total) == pytest.approx(expected, rel=2e-5), source
            assert float(terms[f"loss/{source}"].weight) == float(kept[0].weight)


def test_one_set_alone_is_not_split(models: Models) -> None:
    stage = build_stage(SftSpec(), OPTIONS)
    batch = stage.collate(of_two_sets(random_samples((9, 4))))
    with torch.no_grad():
        assert source_terms(batch, stage.loss(models.handle(), batch, {}), SETS[:1]) == {}


def test_a_set_that_is_called_like_a_loss_keeps_a_name_of_its_own(models: Models) -> None:
    stage = build_stage(DpoSpec(loss={"sigmoid": 1.0, "ipo": 0.5}), OPTIONS)
    samples = [replace(sample, source="ipo") for sample in random_pairs(3)]
    batch = stage.collate(samples)
    with torch.no_grad():
        whole = stage.loss(models.handle(), batch, {})
    assert list(source_terms(batch, whole, ("ipo", "b"))) == ["loss/ipo (data)", "loss/b"]
