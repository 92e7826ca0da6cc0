"""Whole preference runs on a tiny model: references, shared prompts, resuming, the best model, what is logged."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import luthier
from luthier.data.reference_cache import ReferenceCache
from luthier.types import CheckpointError, ModelError
from tests.compared import recipe_for
from tests.tiny import (
    FEEDBACK_COLUMNS,
    chat_model,
    write_feedback,
)

METHODS: dict[str, dict[str, Any]] = {
    "full": {"type": "full"},
    "freeze": {"type": "freeze", "layers": 1},
    "lora": {"type": "lora", "rank": 4},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model with the same tokenizer."""
    return chat_model(tmp_path_factory.mktemp("other"), initializer_range=0.1)


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> dict[str, Any]:
    return recipe_for(
        "dpo",
        tmp_path,
        model,
        rows=(24, 8),
        stage={"type": "dpo"},
        optim={"lr": 0.02},
        train={"rows_per_device": 6, "accumulation": 1, "max_steps": 6, "plots": False},
    )


def changed(recipe: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    return {name: {**value, **sections.pop(name, {})} for name, value in recipe.items()} | sections


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "trainer_log.jsonl").read_text().splitlines()]


def weights_of(run: Path) -> dict[str, Tensor]:
    (file,) = run.glob("*model.safetensors")
    return load_file(file)


def assert_close_runs(one: Path, other: Path, atol: float) -> None:
    first, second = weights_of(one), weights_of(other)
    assert first.keys() == second.keys()
    for name, weight in first.items():
        torch.testing.assert_close(weight, second[name], rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("method", list(METHODS))
def test_dpo_learns_to_tell_the_answers_apart(method: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    result = luthier.train({**recipe, "method": METHODS[method]}, quiet=True)
    training = [line for line in lines_of(result.output) if "loss" in line]
    assert training[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert training[-1]["loss"] < 0.6
    assert result.metrics["eval_rewards/accuracies"] == 1.0
    margin = result.metrics["eval_rewards/chosen"] - result.metrics["eval_rewards/rejected"]
    assert result.metrics["eval_rewards/margins"] == pytest.approx(margin, abs=1e-5)
    assert margin > 0.1
    assert "eval_perplexity" not in result.metrics
    names = {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"}
    assert names | {"logps/chosen", "logps/rejected"} <= training[0].keys()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_reference_computed_before_trains_the_same(
    method: str, recipe: dict[str, Any], tmp_path: Path
) -> None:
    asked = {**recipe, "method": METHODS[method]}
    live = luthier.train(asked, quiet=True)
    before = luthier.train(
        asked, ["stage.reference=precompute", f"train.output={tmp_path / 'kept'}"], quiet=True
    )
    assert_close_runs(live.output, before.output, atol=1e-5)
    for name in ("eval_loss", "eval_rewards/margins"):
        assert before.metrics[name] == pytest.approx(live.metrics[name], abs=1e-5), name
    assert list((tmp_path / "cache" / "reference").iterdir())


def test_another_model_as_reference(recipe: dict[str, Any], other_model: Path, tmp_path: Path) -> None:
    """Live and computed before are the same, and another one than the start."""
    live = changed(recipe, stage={"reference": {"path": str(other_model)}})
    first = luthier.train(live, quiet=True)
    kept = changed(recipe, stage={"reference": {"path": str(other_model), "precompute": True}})
    second = luthier.train(kept, [f"train.output={tmp_path / 'kept'}"], quiet=True)
    assert_close_runs(first.output, second.output, atol=1e-5)
    training = [line for line in lines_of(first.output) if "loss" in line]
    assert abs(training[0]["rewards/chosen"]) > 0.01


def test_another_vocabulary_is_refused(recipe: dict[str, Any], tmp_path: Path) -> None:
    other = chat_model(tmp_path / "wide", vocab_size=300)
    with pytest.raises(ModelError, match=r"has a vocabulary of 300 tokens, and the model of \d+"):
        luthier.train(changed(recipe, stage={"reference": {"path": str(other)}}), quiet=True)
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_a_continued_adapter_is_compared_with_its_start(recipe: dict[str, Any], tmp_path: Path) -> None:
    """`start` begins at log 2, whatever the adapter learnt before; `base` does not."""
    first = luthier.train(recipe, quiet=True)
    continued = changed(recipe, method={"adapters": [str(first.output)]}, train={"max_steps": 2})
    losses = {}
    for choice in ("start", "base", "precompute"):
        run = luthier.train(
            continued, [f"stage.reference={choice}", f"train.output={tmp_path / choice}"], quiet=True
        )
        losses[choice] = [line["loss"] for line in lines_of(run.output) if "loss" in line]
    assert losses["start"][0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses["precompute"] == pytest.approx(losses["start"], abs=1e-5)
    assert losses["base"][0] < 0.6


@pytest.mark.parametrize("loss", ["sigmoid", "orpo", "{sigmoid: 0.7, bco_pair: 0.3}"])
def test_shared_prompts_change_nothing(loss: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    runs = {}
    for shared in (True, False):
        overrides = [f"stage.share_prompts={str(shared).lower()}", f"stage.loss={loss}"]
        runs[shared] = luthier.train(
            recipe, [*overrides, f"train.output={tmp_path / str(shared)}"], quiet=True
        )
    assert runs[True].metrics["train_tokens"] < runs[False].metrics["train_tokens"]
    assert_close_runs(runs[True].output, runs[False].output, atol=2e-5)
    assert runs[True].metrics["eval_loss"] == pytest.approx(runs[False].metrics["eval_loss"], abs=1e-5)


@pytest.mark.parametrize("stage", [{"type": "dpo"}, {"type": "kto"}, {"type": "dpo", "loss": "aot"}])
@pytest.mark.parametrize("reference", ["start", "precompute"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_resumed_is_uninterrupted(
    method: str, reference: str, stage: dict[str, Any], recipe: dict[str, Any], tmp_path: Path
) -> None:
    """Bit by bit, several passes in a step."""
    if stage["type"] == "kto":
        write_feedback(tmp_path / "pairs.json", 24)
        write_feedback(tmp_path / "held_out.json", 8)
        data = {
            name: [{"file_name": f"{file}.json", **FEEDBACK_COLUMNS}]
            for name, file in (("train", "pairs"), ("eval", "held_out"))
        }
        recipe = changed(recipe, data=data)
    asked = {**recipe, "method": METHODS[method], "stage": {**stage, "reference": reference}}
    asked = changed(asked, train={"save_every": 2, "tokens_per_pass": 150})
    straight = luthier.train(asked, quiet=True)
    resumed = luthier.train(
        asked,
        [f"train.resume={straight.output / 'checkpoint-2'}", f"train.output={tmp_path / 'resumed'}"],
        quiet=True,
    )
    assert_close_runs(straight.output, resumed.output, atol=0)


def test_an_interrupt_ends_the_precomputation(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, not after a first step; the run then starts as if nothing had been."""
    asked = {**recipe, "stage": {"type": "dpo", "reference": "precompute"}}
    straight = luthier.train(changed(asked, train={"output": str(tmp_path / "straight")}), quiet=True)
    asked = changed(asked, data={"cache": str(tmp_path / "other_cache")})
    add, signals = ReferenceCache.add, [signal.SIGINT]

    def interrupted(cache: ReferenceCache, entries: Any) -> None:
        add(cache, entries)
        if signals:  # a second one would end the run in any case
            os.kill(os.getpid(), signals.pop())

    # A process that was started in the background may ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(ReferenceCache, "add", interrupted)
            luthier.train(asked, quiet=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not any((tmp_path / "run").glob("checkpoint-*"))
    again = luthier.train(asked, ["train.resume=auto"], quiet=True)
    assert_close_runs(straight.output, again.output, atol=0)


def test_the_best_model_by_its_accuracy(recipe: dict[str, Any], tmp_path: Path) -> None:
    asked = changed(
        recipe,
        train={"eval_every": 2, "save_every": 2, "load_best": True, "best_metric": "eval_rewards/margins"},
    )
    run = luthier.train(asked, quiet=True)
    evaluated = {
        line["current_steps"]: line["eval_rewards/margins"]
        for line in lines_of(run.output)
        if "eval_rewards/margins" in line
    }
    assert max(evaluated.values()) == pytest.approx(run.metrics["eval_rewards/margins"], abs=1e-5)


def test_padded_rows_train_the_same(tmp_path: Path, recipe: dict[str, Any]) -> None:
    flat = luthier.train(recipe, ["stage.share_prompts=false"], quiet=True)
    padded = luthier.train(recipe, ["model.rows=padded", f"train.output={tmp_path / 'padded'}"], quiet=True)
    assert_close_runs(flat.output, padded.output, atol=2e-5)


def test_another_reference_is_another_run(recipe: dict[str, Any], other_model: Path) -> None:
    run = luthier.train(changed(recipe, train={"save_every": 3}), quiet=True)
    again = changed(recipe, stage={"reference": {"path": str(other_model)}}, train={"save_every": 3})
    with pytest.raises(CheckpointError, match=r"stage\.reference was 'start'"):
        luthier.train(again, [f"train.resume={run.output / 'checkpoint-3'}"], quiet=True)


def test_kto_learns(recipe: dict[str, Any], tmp_path: Path) -> None:
    write_feedback(tmp_path / "pairs.json", 30)
    write_feedback(tmp_path / "held_out.json", 10)
    data = {
        "train": [{"file_name": "pairs.json", **FEEDBACK_COLUMNS}],
        "eval": [{"file_name": "held_out.json", **FEEDBACK_COLUMNS}],
    }
    asked = {**changed(recipe, data=data), "stage": {"type": "kto", "beta": 0.5}}
    result = luthier.train(changed(asked, train={"max_steps": 15}), quiet=True)
    training = [line for line in lines_of(result.output) if "loss" in line]
    assert training[0]["loss"] == pytest.approx(0.5, abs=1e-4)
    chosen, rejected = result.metrics["eval_rewards/chosen"], result.metrics["eval_rewards/rejected"]
    assert result.metrics["eval_rewards/margins"] == pytest.approx(chosen - rejected, abs=1e-7)
    assert chosen > rejected
    assert training[-1]["loss"] < training[0]["loss"]
    assert "kl" in training[0]
