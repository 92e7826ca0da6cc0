"""Runs of dft, asft and eaft: how a step is cut changes nothing, and evaluation reports what it should."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from luthier.trainer.metrics import Metric, accuracy
from luthier.trainer.trainer import PeftTrainer
from tests.tiny import random_samples, tiny_model
from tests.training import assert_same_weights, history, recipe_of, trainer_of, weights

LENGTHS = [5, 30, 12, 3, 44, 9, 17, 21] * 2
STAGES: dict[str, dict[str, Any]] = {
    "dft": {"type": "sft", "loss": "dft"},
    "asft": {"type": "sft", "loss": "asft", "kl_weight": 0.5},
    "eaft": {"type": "sft", "loss": "eaft", "entropy_power": 0.5},
}
RATES = {"dft": 1.0, "asft": 1.0}
"""Of random tokens the first two have small gradients: their weights are the small probabilities."""
METHODS: dict[str, dict[str, Any]] = {"full": {"type": "full"}, "lora": {"type": "lora", "rank": 4}}


def built(output: Path, stage: str, method: str, train: dict[str, Any]) -> PeftTrainer:
    recipe = recipe_of(
        output,
        train={"max_steps": 4, **train},
        stage=STAGES.get(stage, {"type": "sft", "loss": stage}),
        optim={"type": "sgd", "lr": RATES.get(stage, 0.05), "momentum": 0.9},
        method=METHODS[method],
    )
    samples, held_out = random_samples(LENGTHS), random_samples(LENGTHS[:5], seed=1)
    metrics = (Metric("accuracy", accuracy),)
    return trainer_of(recipe, tiny_model("llama"), samples, {"made": held_out}, metrics)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stage", STAGES)
def test_rows_and_accumulation(stage: str, method: str, tmp_path: Path) -> None:
    """Eight rows at once = one row eight times = any limit of tokens; asft's reference stays where it was."""
    whole = {"rows_per_device": 8, "accumulation": 1, "tokens_per_pass": 100_000}
    reference = built(tmp_path, stage, method, whole)
    start = weights(reference.model)
    reference.train()
    losses = history(reference, "loss")
    assert len(set(losses)) == 4
    for way in ({"rows_per_device": 1, "accumulation": 8}, {**whole, "tokens_per_pass": 60}):
        trainer = built(tmp_path, stage, method, way)
        trainer.train()
        assert history(trainer, "loss") == pytest.approx(losses, rel=1e-5)
        for name in ("nll", "kl"):
            expected = history(reference, name)
            assert len(expected) == (0 if name == "kl" and stage != "asft" else 4)
            assert history(trainer, name) == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert_same_weights(weights(trainer.model), weights(reference.model), start, 1e-4)
    if stage == "asft":
        divergence = history(reference, "kl")
        assert divergence[0] == pytest.approx(0, abs=1e-6)
        assert divergence[-1] > 1e-4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stage", STAGES)
def test_evaluation(stage: str, method: str, tmp_path: Path) -> None:
    """Perplexity is of the plain likelihood, which cross-entropy calls its loss; metrics see the same rows."""
    found = {}
    for name in (stage, "cross_entropy"):
        found[name] = built(tmp_path, name, method, {"rows_per_device": 2}).evaluate()
    variant, plain = found[stage], found["cross_entropy"]
    assert variant["eval_nll"] == pytest.approx(plain["eval_loss"], rel=1e-6)
    assert variant["eval_perplexity"] == pytest.approx(math.exp(plain["eval_loss"]), rel=1e-5)
    assert variant["eval_loss"] != pytest.approx(plain["eval_loss"], rel=1e-2)
    assert variant["eval_accuracy"] == plain["eval_accuracy"]
    assert ("eval_kl" in variant) == (stage == "asft")
