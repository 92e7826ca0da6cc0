"""How a step's rows are cut into passes changes neither its loss nor the weights after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from luthier.recipe.schema import Recipe
from luthier.trainer.trainer import PeftTrainer
from tests.tiny import random_samples, tiny_model
from tests.training import assert_same_weights, history, recipe_of, trainer_of, weights

LENGTHS = [5, 30, 12, 3, 44, 9, 17, 21] * 3
ROWS = {"rows_per_device": 8, "accumulation": 1}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"type": "sgd", "lr": 0.05, "momentum": 0.9, "max_grad_norm": 0.5},
    "adamw": {"type": "adamw", "lr": 3e-3, "eps": 1e-6, "weight_decay": 0.1, "warmup": 2},
}


def trained(output: Path, train: dict[str, Any], **sections: Any) -> PeftTrainer:
    recipe: Recipe = recipe_of(output, train={"max_steps": 3, **train}, **sections)
    trainer = trainer_of(recipe, tiny_model("llama"), random_samples(LENGTHS))
    trainer.train()
    return trainer


def assert_same_runs(trainer: PeftTrainer, reference: PeftTrainer, start: dict[str, Any]) -> None:
    losses = history(reference, "loss")
    assert len(losses) == 3
    assert len(set(losses)) == 3
    assert history(trainer, "loss") == pytest.approx(losses, rel=1e-5)
    assert history(trainer, "grad_norm") == pytest.approx(history(reference, "grad_norm"), rel=1e-4)
    assert trainer.state.num_input_tokens_seen == reference.state.num_input_tokens_seen
    assert_same_weights(weights(trainer.model), weights(reference.model), start, 1e-4)


def start_of(output: Path, **sections: Any) -> dict[str, Any]:
    recipe = recipe_of(output, train=ROWS, **sections)
    return weights(trainer_of(recipe, tiny_model("llama"), random_samples(LENGTHS)).model)


@pytest.mark.parametrize("method", [{"type": "full"}, {"type": "lora", "rank": 4}], ids=["full", "lora"])
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_rows_and_accumulation(optim: str, method: dict[str, Any], tmp_path: Path) -> None:
    """Eight rows at once = one row eight times = two rows four times, and any limit of tokens."""
    sections = {"optim": OPTIMIZERS[optim], "method": method}
    start = start_of(tmp_path, **sections)
    reference = trained(tmp_path, {**ROWS, "tokens_per_pass": 100_000}, **sections)
    assert reference.state.num_input_tokens_seen == sum(LENGTHS)
    ways = [
        {"rows_per_device": 1, "accumulation": 8},
        {"rows_per_device": 2, "accumulation": 4, "tokens_per_pass": 44},
        {**ROWS, "tokens_per_pass": 1},
        {**ROWS, "tokens_per_pass": 60},
    ]
    for way in ways:
        assert_same_runs(trained(tmp_path, way, **sections), reference, start)


def test_micro_batches_as_they_are(tmp_path: Path) -> None:
    """Without a limit of tokens (a value that only a hand-made plan has) the micro-batches are the passes."""
    recipe = recipe_of(tmp_path, train={"rows_per_device": 1, "accumulation": 8, "max_steps": 3})
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"tokens_per_pass": None})})
    trainer = trainer_of(recipe, tiny_model("llama"), random_samples(LENGTHS))
    assert [len(passes) for passes in trainer.get_train_dataloader()] == [8, 8, 8]
    trainer.train()
    sections: dict[str, Any] = {}
    assert_same_runs(trainer, trained(tmp_path, ROWS, **sections), start_of(tmp_path, **sections))


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_tokens_rule(optim: str, tmp_path: Path) -> None:
    """The same with steps that are counted in tokens."""
    sections = {"optim": OPTIMIZERS[optim], "method": {"type": "full"}}
    start = start_of(tmp_path, **sections)
    rule = {"tokens_per_batch": 140}
    reference = trained(tmp_path, {**rule, "tokens_per_pass": 140}, **sections)
    for limit in (1, 50, 77):
        assert_same_runs(trained(tmp_path, {**rule, "tokens_per_pass": limit}, **sections), reference, start)


def test_packing(tmp_path: Path) -> None:
    """Packed rows: two at once = one, twice."""
    sections: dict[str, Any] = {
        "optim": OPTIMIZERS["adamw"], "method": {"type": "full"}, "data": {"packing": True, "max_length": 64}
    }  # fmt: skip
    start = start_of(tmp_path, **sections)
    reference = trained(tmp_path, {"rows_per_device": 2, "tokens_per_pass": 1000}, **sections)
    other = trained(tmp_path, {"rows_per_device": 1, "accumulation": 2, "tokens_per_pass": 30}, **sections)
    assert_same_runs(other, reference, start)


def test_another_seed_is_another_order(tmp_path: Path) -> None:
    """So the equalities above are not equalities of runs that ignore their rows. 0 is a seed like any other."""
    losses = [
        tuple(history(trained(tmp_path, {**ROWS, "seed": 42, **extra}), "loss"))
        for extra in ({}, {"data_seed": 42}, {"data_seed": 0}, {"data_seed": 1})
    ]
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3
