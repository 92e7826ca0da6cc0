"""A NaN is never hidden: the run stops, leaves the step out, or goes back, as the recipe says."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import luthier
from luthier.recipe.schema import BadNumbersSpec
from luthier.stages.sft import SupervisedFineTuning
from luthier.trainer.bad_numbers import BadNumbersError, NumberGuard, Rewind
from luthier.trainer.trainer import PeftTrainer
from luthier.types import LossSum, Term
from tests.tiny import chat_model, write_alpaca

STEPS = 8


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    chat_model(tmp_path / "model")
    write_alpaca(tmp_path / "rows.json", 4 * STEPS)
    return {
        "model": {"path": str(tmp_path / "model")},
        "data": {"train": ["rows.json"], "directory": str(tmp_path), "cache": str(tmp_path / "cache")},
        "method": {"type": "lora", "rank": 4},
        "optim": {"type": "adamw", "lr": 0.01, "schedule": "constant"},
        "train": {
            "rows_per_device": 4,
            "epochs": 1,
            "save_every": 2,
            "log_every": 1,
            "plots": False,
            "output": str(tmp_path / "run"),
        },
    }


def plant(monkeypatch: pytest.MonkeyPatch, at: set[int], factor: float) -> Callable[[], list[set[int]]]:
    """Multiply the loss by `factor` in the forward passes of these steps (counted as data, from 1)."""
    step, loss, seen = PeftTrainer.training_step, SupervisedFineTuning.loss, list[set[int]]()
    now = {"step": 0}

    def counting(self: PeftTrainer, model: Any, inputs: Any, *rest: Any) -> torch.Tensor:
        now["step"] = self.state.global_step + 1
        seen.append({index for batch in inputs for _, index in batch.samples})
        return step(self, model, inputs, *rest)

    def planted(self: SupervisedFineTuning, policy: Any, batch: Any, observed: Any) -> LossSum:
        found = loss(self, policy, batch, observed)
        if now["step"] not in at:
            return found
        terms = {name: Term(term.total * factor, term.weight) for name, term in found.terms.items()}
        return LossSum(terms, found.metrics)

    monkeypatch.setattr(PeftTrainer, "training_step", counting)
    monkeypatch.setattr(SupervisedFineTuning, "loss", planted)
    return lambda: seen


def lines(run: Path, name: str = "trainer_log.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter_model.safetensors")


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_stop_names_the_rows_and_keeps_the_checkpoints(
    factor: float, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = plant(monkeypatch, {5}, factor)
    with pytest.raises(BadNumbersError, match=f"step 5: the loss is {factor}; its rows are rows ") as caught:
        luthier.train(recipe, quiet=True)
    run = tmp_path / "run"
    (entry,) = lines(run, "bad_numbers.jsonl")
    assert entry["current_steps"] == 5 and entry["action"] == "stop"
    assert {index for _, index in entry["rows"]} == seen()[4]
    assert all(f"rows {index}" in str(caught.value) for index in seen()[4])
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert [line["current_steps"] for line in lines(run)] == [1, 2, 3, 4]
    assert not (run / "adapter_model.safetensors").exists()


def test_skip_leaves_the_step_out_and_nothing_else(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With plain SGD and a constant rate, a skipped step is a step without gradient: the closed form."""
    recipe["optim"] = {"type": "sgd", "lr": 0.5, "schedule": "constant"}
    plant(monkeypatch, {3}, 0.0)
    expected = weights(luthier.train(recipe, [f"train.output={tmp_path / 'zero'}"], quiet=True).output)
    monkeypatch.undo()
    plant(monkeypatch, {3}, math.nan)
    words = ["train.bad_numbers.action=skip", "train.log_every=2"]
    result = luthier.train(recipe, words, quiet=True)
    for name, tensor in weights(result.output).items():
        assert torch.equal(tensor, expected[name]), name
    log = [line for line in lines(result.output) if "loss" in line]
    assert [line.get("bad_steps") for line in log] == [None, 1, 1, 1]
    whole = {line["current_steps"]: line["loss"] for line in lines(tmp_path / "zero") if "loss" in line}
    assert log[1]["loss"] == pytest.approx(whole[4], rel=1e-6)  # the mean of the good step alone
    good = [loss for step, loss in whole.items() if step != 3]
    assert result.metrics["train_loss"] == pytest.approx(sum(good) / len(good), rel=1e-6)


def test_too_many_in_a_row_stop_the_run(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, {2, 4, 5}, math.nan)
    words = ["train.bad_numbers={action: skip, limit: 1}"]
    with pytest.raises(BadNumbersError, match=r"^step 5: .* It is the 2nd bad step in a row"):
        luthier.train(recipe, words, quiet=True)


def test_rewind_goes_back_and_leaves_the_window_out(
    recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Bad at 6, checkpoint at 4: the end is that of a run whose steps 5 and 6 did nothing."""
    plant(monkeypatch, {6}, math.nan)
    result = luthier.train(recipe, ["train.bad_numbers.action=rewind"])
    assert "Going on from checkpoint-4, without the rows since then" in capsys.readouterr().out
    bad, window = lines(result.output, "bad_numbers.jsonl")
    assert bad["action"] == "rewind" and window == {"current_steps": 4, "not_trained": [5, 6]}
    monkeypatch.undo()
    # The reference: the same run, whose ledger is told from the start to leave out steps 5 and 6.
    monkeypatch.setattr(NumberGuard, "leaves_out", lambda self, step: step in (5, 6))
    expected = luthier.train(recipe, [f"train.output={tmp_path / 'reference'}"], quiet=True)
    for name, tensor in weights(expected.output).items():
        assert torch.equal(weights(result.output)[name], tensor), name
    steps = [line["current_steps"] for line in lines(result.output) if "loss" in line]
    assert steps == list(range(1, STEPS + 1))  # each step once, whatever came before
    assert [line["loss"] for line in lines(result.output) if "loss" in line][4:6] == ["NaN", "NaN"]


def test_a_resumed_run_remembers_what_was_left_behind(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, {6}, math.nan)
    whole = weights(luthier.train(recipe, ["train.bad_numbers.action=rewind"], quiet=True).output)
    run = tmp_path / "run"
    for name in ("checkpoint-6", "checkpoint-8"):
        (run / name / "adapter_model.safetensors").write_bytes(b"damaged")
    luthier.train(recipe, ["train.bad_numbers.action=rewind", "train.resume=auto"], quiet=True)
    for name, tensor in weights(run).items():
        assert torch.equal(tensor, whole[name]), name
    assert len(lines(run, "bad_numbers.jsonl")) == 2


def test_nothing_to_go_back_to(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, {1}, math.nan)
    with pytest.raises(BadNumbersError, match="There is no checkpoint to go back to"):
        luthier.train(recipe, ["train.bad_numbers.action=rewind"], quiet=True)


def test_a_spike_is_bad_where_the_recipe_says_so(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, {7}, 50.0)
    luthier.train(recipe, quiet=True)
    words = ["train.bad_numbers={action: stop, spike: 6, window: 5}", "train.overwrite=true"]
    with pytest.raises(BadNumbersError, match=r"step 7: the loss jumped to .* the last 5 were"):
        luthier.train(recipe, words, quiet=True)


def test_the_limit_of_a_spike_in_closed_form(tmp_path: Path) -> None:
    guard = NumberGuard(BadNumbersSpec(spike=2.0, window=4), tmp_path)
    for loss in (1.0, 3.0, 1.0, 3.0):
        assert guard.reason(loss, 1.0) is None
        guard.good(loss)
    # mean 2, standard deviation 1: up to 4 is good
    assert guard.reason(4.0, 1.0) is None
    assert guard.reason(4.0001, 1.0) == "the loss jumped to 4.0001: the last 4 were 2 with a spread of 1"
    assert guard.reason(2.0, math.nan) == "the gradient norm is nan (the loss is 2)"


def test_rewinds_are_bounded(tmp_path: Path) -> None:
    guard = NumberGuard(BadNumbersSpec(action="rewind", limit=2), tmp_path)
    for number in (1, 2):
        with pytest.raises(Rewind):
            guard.bad(10 * number, "the loss is nan", [("a", 1)])
        guard.rewound(10 * number - 2, 10 * number)
    assert [guard.leaves_out(step) for step in (8, 9, 10, 11, 19, 20)] == [
        False,
        True,
        True,
        False,
        True,
        True,
    ]
    with pytest.raises(BadNumbersError, match="went back 2 times already"):
        guard.bad(30, "the loss is nan", [("a", 1)])


@pytest.mark.parametrize("at", [2, 3, 4])
def test_log_and_mean_are_right_after_a_resume_between_log_lines(
    at: int, recipe: dict[str, Any], tmp_path: Path
) -> None:
    """A checkpoint inside a logging window: the resumed run's line covers the steps before it, too."""
    recipe["train"] |= {"log_every": 3, "save_every": 1, "output": str(tmp_path / "straight")}
    straight = luthier.train(recipe, quiet=True)
    run = tmp_path / "run"
    recipe["train"] |= {"output": str(run)}
    luthier.train(recipe, quiet=True)
    for path in run.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > at:
            (path / "adapter_model.safetensors").write_bytes(b"damaged")
    resumed = luthier.train(recipe, ["train.resume=auto"], quiet=True)
    found, expected = (
        [(line["current_steps"], line["loss"]) for line in lines(place) if "loss" in line]
        for place in (run, straight.output)
    )
    assert found == expected
    assert resumed.metrics["train_loss"] == straight.metrics["train_loss"]
