"""Evaluation: exact sums over all tokens, whatever the passes and the sets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.types import Sample
from tests.reference import dense_answers
from tests.tiny import random_samples, tiny_model
from tests.training import history, recipe_of, trainer_of, weights

SETS = {"long": random_samples([40, 33, 25], seed=1), "short": random_samples([5, 3, 9, 4], seed=2)}


def sums(samples: Sequence[Sample]) -> tuple[float, float]:
    """Weighted negative log-likelihood and weight, by dense logits of padded rows."""
    with torch.no_grad():
        answers = dense_answers(tiny_model("llama", "eager").eval(), samples)
    return float(-(answers.weights * answers.logprobs).sum()), float(answers.weights.sum())


def evaluated(
    output: Path, sets: Mapping[str, Sequence[Sample]], tokens_per_pass: int = 1000, **sections: Any
) -> dict[str, float]:
    recipe = recipe_of(
        output, train={"tokens_per_pass": tokens_per_pass}, method={"type": "full"}, **sections
    )
    return trainer_of(recipe, tiny_model("llama"), random_samples([8, 8]), sets).evaluate()


@pytest.mark.parametrize("tokens_per_pass", [1, 40, 60, 1000])
def test_one_set(tokens_per_pass: int, tmp_path: Path) -> None:
    metrics = evaluated(tmp_path, {"long": SETS["long"]}, tokens_per_pass)
    total, weight = sums(SETS["long"])
    assert metrics["eval_loss"] == pytest.approx(total / weight, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(total / weight), rel=1e-4)
    assert not any("long" in name for name in metrics)


@pytest.mark.parametrize("tokens_per_pass", [1, 40, 1000])
def test_several_sets(tokens_per_pass: int, tmp_path: Path) -> None:
    """Each by its name; the whole weighs tokens, not sets."""
    metrics = evaluated(tmp_path, SETS, tokens_per_pass)
    each = {name: sums(samples) for name, samples in SETS.items()}
    for name, (total, weight) in each.items():
        assert metrics[f"eval_{name}_loss"] == pytest.approx(total / weight, rel=1e-5)
        assert metrics[f"eval_{name}_perplexity"] == pytest.approx(math.exp(total / weight), rel=1e-4)
    total, weight = (sum(column) for column in zip(*each.values(), strict=True))
    assert metrics["eval_loss"] == pytest.approx(total / weight, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(total / weight), rel=1e-4)
    mean_of_means = sum(total / weight for total, weight in each.values()) / 2
    assert abs(metrics["eval_loss"] - mean_of_means) > 1e-3


def test_perplexity_is_of_the_plain_likelihood(tmp_path: Path) -> None:
    """Label smoothing changes the loss, never the perplexity."""
    metrics = evaluated(tmp_path, {"short": SETS["short"]}, stage={"type": "sft", "label_smoothing": 0.3})
    total, weight = sums(SETS["short"])
    assert metrics["eval_nll"] == pytest.approx(total / weight, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(total / weight), rel=1e-4)
    assert abs(metrics["eval_loss"] - total / weight) > 0.05


def test_set_without_targets(tmp_path: Path) -> None:
    """A set that teaches nothing has no loss of its own and takes nothing from the others."""
    silent = [Sample(sample.input_ids, sample.weights * 0) for sample in SETS["long"]]
    metrics = evaluated(tmp_path, {"silent": silent, "short": SETS["short"]})
    total, weight = sums(SETS["short"])
    assert math.isnan(metrics["eval_silent_loss"])
    assert metrics["eval_short_loss"] == pytest.approx(total / weight, rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(total / weight, rel=1e-5)


def test_evaluating_while_training_changes_nothing(tmp_path: Path) -> None:
    """The weights after training are the same with and without, and dropout is off while evaluating."""
    results = []
    for every in (None, 1):
        recipe = recipe_of(
            tmp_path,
            method={"type": "lora", "rank": 4, "dropout": 0.5},
            data={"eval": ["made too"]},
            train={"rows_per_device": 2, "max_steps": 3, "eval_every": every},
        )
        trainer = trainer_of(recipe, tiny_model("llama"), random_samples([9, 12, 7, 20]), SETS)
        trainer.train()
        results.append(weights(trainer.model))
        assert len(history(trainer, "eval_loss")) == (0 if every is None else 3)
        if every:
            assert trainer.evaluate()["eval_loss"] == history(trainer, "eval_loss")[-1]
    assert results[0].keys() == results[1].keys()
    for name, weight in results[0].items():
        assert torch.equal(weight, results[1][name]), name
