"""`train.generate_at_eval`: the model in training answers the evaluation sets; the training itself stays the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import luthier
from luthier.measures.text import CORPUS_METRICS, ROW_METRICS
from luthier.recipe.load import load_recipe
from luthier.types import RecipeError
from tests.tiny import chat_model, write_alpaca

NAMES = (*ROW_METRICS, *CORPUS_METRICS)
WORDS = ("red", "blue", "green", "black", "white", "brown")


def write_words(file: Path) -> None:
    rows = [{"instruction": f"Say {word}.", "input": "", "output": word} for word in WORDS for _ in range(2)]
    file.write_text(json.dumps(rows), encoding="utf-8")


def tree(folder: Path, name: str = "run", **train: Any) -> dict[str, Any]:
    if not (folder / "model").exists():
        chat_model(folder / "model")
        write_words(folder / "rows.json")
        write_words(folder / "held.json")
    return {
        "model": {"path": str(folder / "model")},
        "data": {
            "train": ["rows.json"],
            "eval": ["held.json"],
            "directory": str(folder),
            "cache": str(folder / "cache"),
        },
        "method": {"type": "full"},
        "optim": {"type": "adamw", "lr": 0.01, "schedule": "constant"},
        "generation": {"max_new_tokens": 8},
        "train": {
            "rows_per_device": 12,
            "max_steps": 40,
            "eval_every": 10,
            "save_every": 10,
            "log_every": 1,
            "plots": False,
            "output": str(folder / name),
            **train,
        },
    }


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "trainer_log.jsonl").read_text().splitlines()]


def test_evaluations_report_answers_and_the_training_is_bitwise_the_same(tmp_path: Path) -> None:
    """With dropout in the training and drawn tokens in the answers, either would notice the other's random numbers."""
    changes = {
        "method": {"type": "lora", "rank": 4, "dropout": 0.2},
        "generation": {"temperature": 1.0, "max_new_tokens": 8},
    }
    few = {"max_steps": 6, "eval_every": 2, "save_every": None}
    plain = luthier.train(tree(tmp_path, "plain", **few) | changes, quiet=True)
    answered = luthier.train(tree(tmp_path, "answered", generate_at_eval={}, **few) | changes, quiet=True)
    for name, weight in load_file(plain.output / "adapter_model.safetensors").items():
        assert torch.equal(weight, load_file(answered.output / "adapter_model.safetensors")[name])
    losses = [[line["loss"] for line in log_of(run.output) if "loss" in line] for run in (plain, answered)]
    assert losses[0] == losses[1]
    lines = [line for line in log_of(answered.output) if "eval_rouge-l" in line]
    assert [line["current_steps"] for line in lines] == [2, 4, 6]
    assert {f"eval_{name}" for name in NAMES} <= lines[-1].keys()
    assert not any("eval_rouge-l" in line for line in log_of(plain.output))


def test_the_best_checkpoint_can_be_that_of_the_best_answers(tmp_path: Path) -> None:
    """The first of those that answer all rows, though the loss goes on falling; and `predict` with the finished run says
    the same numbers."""
    recipe = tree(tmp_path, generate_at_eval={}, load_best=True, best_metric="eval_exact_match", max_steps=60)
    run = luthier.train(recipe, quiet=True)
    lines = [line for line in log_of(run.output) if "eval_exact_match" in line and "loss" not in line]
    by_step = {line["current_steps"]: line for line in lines[:6]}
    assert list(by_step) == [10, 20, 30, 40, 50, 60]
    best = next(step for step, line in by_step.items() if line["eval_exact_match"] == 100)
    assert by_step[10]["eval_exact_match"] < 100
    assert by_step[60]["eval_loss"] < by_step[best]["eval_loss"], "the loss would have chosen another one"
    state = json.loads((run.output / "trainer_state.json").read_text(encoding="utf-8"))
    assert (state["best_global_step"], state["best_metric"]) == (best, 100)
    assert run.metrics["eval_loss"] == pytest.approx(by_step[best]["eval_loss"], rel=1e-5)
    checkpoint = luthier.predict(run.output / "checkpoint-10", quiet=True)
    for name in NAMES:
        assert checkpoint.metrics[f"predict_{name}"] == pytest.approx(
            by_step[10][f"eval_{name}"], abs=1e-4
        ), name
    assert luthier.predict(run.output, quiet=True).metrics["predict_exact_match"] == 100


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """Where the one before had no answers, too: they are no part of what a run is."""
    few = {"max_steps": 4, "eval_every": 2, "save_every": 2}
    whole = luthier.train(tree(tmp_path, "whole", generate_at_eval={}, **few), quiet=True)
    parts = luthier.train(tree(tmp_path, "parts", **few), quiet=True).output
    shutil.rmtree(parts / "checkpoint-4")
    again = tree(tmp_path, "parts", generate_at_eval={}, resume="auto", **few)
    again["generation"] = {"max_new_tokens": 5}
    resumed = luthier.train(again, quiet=True)
    assert log_of(resumed.output)[-1]["resumed_from"] == 2
    for name, weight in load_file(whole.output / "model.safetensors").items():
        assert torch.equal(weight, load_file(resumed.output / "model.safetensors")[name])


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("stage", {"type": "pt"}, "train.generate_at_eval goes with stage: sft, and this is pt"),
        ("data", {"eval": []}, "train.generate_at_eval needs something to evaluate on"),
        ("data", {"train_on_prompt": True}, "does not go with data.train_on_prompt: true"),
        ("data", {"overflow": "split"}, "does not go with data.overflow: split"),
    ],
)
def test_what_has_no_answers_is_refused(
    tmp_path: Path, section: str, values: dict[str, Any], message: str
) -> None:
    recipe = tree(tmp_path, generate_at_eval={}, eval_every=None)
    recipe[section] = {**recipe.get(section, {}), **values}
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe)


def test_several_sets_have_their_own_numbers_and_common_ones(tmp_path: Path) -> None:
    recipe = tree(tmp_path, generate_at_eval={"max_samples": 3}, max_steps=2, eval_every=2, save_every=None)
    write_alpaca(tmp_path / "counts.json", 4)
    recipe["data"]["eval"] = ["held.json", "counts.json"]
    metrics = luthier.train(recipe, quiet=True).metrics
    each = [metrics[f"eval_{name}_chrf"] for name in ("held", "counts")]
    assert min(each) - 1e-9 <= metrics["eval_chrf"] <= max(each) + 1e-9
    means = [metrics[f"eval_{name}_bleu-4"] for name in ("held", "counts")]
    assert metrics["eval_bleu-4"] == pytest.approx(sum(means) / 2)
