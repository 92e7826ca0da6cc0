"""Losses of real pairs and marked answers on SmolLM2 = TRL's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from luthier.data.encode import EncodeOptions
from luthier.data.partners import Mismatched
from luthier.data.prepare import Preparation, prepare
from luthier.data.template import load_template
from luthier.model.load import load_tokenizer, locate
from luthier.model.logprobs import ModelPolicy, install_target_forward
from luthier.model.reference import OtherModel
from luthier.recipe.schema import DataSpec, DpoSpec, KtoSpec, ModelSpec
from luthier.stages import build_stage
from luthier.types import Sample, Stage
from tests.parity.test_kto import kto_trainer, trl_batch
from tests.parity.test_pair_losses import dpo_trainer, trl_loss


def real_samples(stage: Stage, data: str, folder: Path, model: Path, cache: Path) -> list[Sample]:
    """The first four rows of a demonstration data set that are short, as a run would train on them."""
    spec = DataSpec(train=(data,), directory=str(folder), max_samples=60, cache=str(cache))
    source = ModelSpec(path=str(model))
    template = load_template(load_tokenizer(source, locate(source)), spec)
    how = Preparation(stage.encode, template, stage.kind, {"stage": stage.name}, seed=0)
    samples: Sequence[Sample] = prepare(spec, how).train[:4]
    assert len(samples) == 4
    return list(Mismatched(samples) if stage.needs_mismatched else samples)


def loaded(model: Path, attention: str, difference: float) -> PreTrainedModel:
    """SmolLM2 with every weight moved by this part of it, up or down."""
    network = AutoModelForCausalLM.from_pretrained(model, attn_implementation=attention, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters() if difference else ():
            parameter.mul_(1 + difference * torch.randn(parameter.shape, generator=generator))
    assert isinstance(network, PreTrainedModel)
    return network.eval()


def luthier_policy(model: Path) -> ModelPolicy:
    policy, reference = (loaded(model, "luthier_segments", size) for size in (0.0, 0.01))
    install_target_forward(policy)
    install_target_forward(reference)
    return ModelPolicy(policy, reference=OtherModel(reference))


def trl_models(model: Path) -> tuple[Any, Any, PreTrainedTokenizerFast]:
    source = ModelSpec(path=str(model))
    tokenizer = load_tokenizer(source, locate(source))
    return loaded(model, "sdpa", 0.0), loaded(model, "sdpa", 0.01), tokenizer


OPTIONS = EncodeOptions(max_length=160, overflow="drop")


@pytest.mark.slow
def test_pairs(smollm2: Path, shared_data: Path, tmp_path: Path) -> None:
    stages = {
        name: build_stage(DpoSpec.model_validate({"loss": name}), OPTIONS) for name in ("sigmoid", "ipo")
    }
    samples = real_samples(stages["sigmoid"], "dpo_en_demo", shared_data, smollm2, tmp_path / "cache")
    with torch.no_grad():
        trainer = dpo_trainer(*trl_models(smollm2), tmp_path)
        expected = {
            name: float(trl_loss(trainer, samples, {"loss_types": [name], "beta": 0.1})) for name in stages
        }
        del trainer
        policy = luthier_policy(smollm2)
        for name, stage in stages.items():
            term = stage.loss(policy, stage.collate(samples), {}).terms["loss"]
            assert float(term.total / term.weight) == pytest.approx(expected[name], rel=1e-4)
    # Far, in units of the tolerance, from what a policy equal to its reference has.
    assert abs(expected["sigmoid"] - 0.6931) > 100 * 1e-4 * 0.6931


@pytest.mark.slow
def test_marked_answers(smollm2: Path, shared_data: Path, tmp_path: Path) -> None:
    stage = build_stage(KtoSpec(beta=0.5), OPTIONS)
    samples = real_samples(stage, "kto_en_demo", shared_data, smollm2, tmp_path / "cache")
    with torch.no_grad():
        trainer = kto_trainer(*trl_models(smollm2), tmp_path, "kto")
        trainer.beta = 0.5
        expected = float(trainer._compute_loss(trainer.model, trl_batch(samples), False))
        del trainer
        policy, batch = luthier_policy(smollm2), stage.collate(samples)
        loss_sum = stage.loss(policy, batch, stage.observe(policy, [batch]))
    term = loss_sum.terms["loss"]
    assert float(term.total / term.weight) == pytest.approx(expected, rel=1e-4)
    # Far, in units of the tolerance, from what a policy equal to its reference has.
    assert abs(expected - 0.5) > 100 * 1e-4 * expected
