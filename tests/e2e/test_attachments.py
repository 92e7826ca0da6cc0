"""Callbacks, metrics and early stopping of a recipe, in whole runs; the best checkpoint by a metric; resuming."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import luthier
from luthier.trainer.arguments import training_arguments
from luthier.types import RecipeError
from tests.tiny import chat_model, write_alpaca
from tests.training import recipe_of

CODE = '''
import json
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

OUT = Path(__file__).with_name("seen.jsonl")


def note(**what):
    with OUT.open("a") as stream:
        stream.write(json.dumps(what) + "\\n")


class Watch(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        trains = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        note(event="begin", output=args.output_dir, max_steps=state.max_steps, trains=trains)

    def on_step_end(self, args, state, control, **kwargs):
        note(event="step", step=state.global_step, tokens=state.num_input_tokens_seen)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        note(event="evaluate", step=state.global_step, metrics=metrics)


class StopAtThree(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 3


class Counting(TrainerCallback, ExportableState):
    """Remembers the loss of every step; only a restored one knows those before the checkpoint."""

    def __init__(self):
        self.losses = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])

    def on_train_end(self, args, state, control, **kwargs):
        note(event="losses", losses=self.losses)

    def state(self):
        return {"args": {}, "attributes": {"losses": self.losses}}


def hump(rows):
    """Rises to the third evaluation, then stays a little lower."""
    import re

    steps = [json.loads(line)["step"] for line in OUT.read_text().splitlines() if '"step"' in line]
    return {2: 0.1, 4: 0.2, 6: 0.5}.get(max(steps), 0.4)
'''


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> dict[str, Any]:
    write_alpaca(tmp_path / "rows.json", 30)
    (tmp_path / "mine.py").write_text(CODE)
    return {
        "model": {"path": str(model)},
        "data": {
            "train": ["rows.json"],
            "directory": str(tmp_path),
            "cache": str(tmp_path / "cache"),
            "dev_split": 6,
        },
        "method": {"type": "lora", "rank": 4},
        "optim": {"type": "adamw", "lr": 0.02},
        "train": {
            "rows_per_device": 2,
            "epochs": 1,
            "log_every": 1,
            "eval_every": 2,
            "save_every": 2,
            "plots": False,
            "output": str(tmp_path / "run"),
        },
    }


def train(recipe: dict[str, Any], *overrides: str, **changes: Any) -> luthier.run.TrainResult:
    return luthier.train({**recipe, "train": {**recipe["train"], **changes}}, overrides, quiet=True)


def seen(tmp_path: Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def log(run: Path, key: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "trainer_log.jsonl").read_text().splitlines()]
    return {line["current_steps"]: line[key] for line in lines if key in line}


def test_hooks_see_the_real_state(recipe: dict[str, Any], tmp_path: Path) -> None:
    result = train(recipe, callbacks=[str(tmp_path / "mine.py:Watch")], metrics=["accuracy"])
    run = result.output
    (begin,) = seen(tmp_path, "begin")
    trained = sum(tensor.numel() for tensor in load_file(run / "adapter_model.safetensors").values())
    assert begin == {"event": "begin", "output": str(run), "max_steps": 12, "trains": trained}
    steps = seen(tmp_path, "step")
    assert {line["step"]: line["tokens"] for line in steps} == log(run, "tokens")
    evaluations = seen(tmp_path, "evaluate")
    # The one after the last step is that of the finished run too.
    assert [line["step"] for line in evaluations] == [2, 4, 6, 8, 10, 12]
    for key in ("eval_loss", "eval_accuracy"):
        assert result.metrics[key] == evaluations[-1]["metrics"][key]
        assert {line["step"]: line["metrics"][key] for line in evaluations} == log(run, key)


def test_a_callback_stops_the_training(recipe: dict[str, Any], tmp_path: Path) -> None:
    run = train(recipe, callbacks=[str(tmp_path / "mine.py:StopAtThree")]).output
    assert list(log(run, "loss")) == [1, 2, 3]
    assert (run / "adapter_model.safetensors").is_file()


def test_the_recipe_s_folder_is_looked_in(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    file = tmp_path / "recipe.json"
    file.write_text(
        json.dumps({**recipe, "train": {**recipe["train"], "callbacks": ["mine.py:StopAtThree"]}})
    )
    assert list(log(luthier.train(file, quiet=True).output, "loss")) == [1, 2, 3]


def resumed_from(run: Path, step: int, tmp_path: Path) -> Path:
    """A run as a kill after `step` leaves it."""
    copy = tmp_path / f"from-{step}"
    copy.mkdir()
    for name in ("recipe.yaml", "trainer_log.jsonl"):
        shutil.copy(run / name, copy / name)
    shutil.copytree(run / f"checkpoint-{step}", copy / f"checkpoint-{step}")
    return copy


def test_a_callback_s_state_is_restored(recipe: dict[str, Any], tmp_path: Path) -> None:
    callbacks = [str(tmp_path / "mine.py:Counting")]
    run = train(recipe, callbacks=callbacks).output
    train(recipe, "train.resume=auto", callbacks=callbacks, output=str(resumed_from(run, 6, tmp_path)))
    straight, resumed = seen(tmp_path, "losses")
    assert len(straight["losses"]) == 12
    assert resumed == straight


EARLY = {"early_stopping": {"patience": 2}, "load_best": True}


@pytest.fixture
def stopped(recipe: dict[str, Any], tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """A run by a metric that is best at step 6 of 12: patience 2 ends it at step 10."""
    settings = {
        **EARLY,
        "metrics": [str(tmp_path / "mine.py:hump")],
        "best_metric": "eval_hump",
        "callbacks": [str(tmp_path / "mine.py:Watch")],
    }
    return settings, train(recipe, **settings).output


def test_early_stopping_counts_evaluations_without_improvement(
    stopped: tuple[dict[str, Any], Path],
) -> None:
    run = stopped[1]
    assert log(run, "eval_hump") == {2: 0.1, 4: 0.2, 6: 0.5, 8: 0.4, 10: 0.4}
    assert list(log(run, "loss")) == list(range(1, 11))
    state = json.loads((run / "trainer_state.json").read_text())
    assert (state["best_global_step"], state["best_metric"]) == (6, 0.5)
    final, best = (load_file(folder / "adapter_model.safetensors") for folder in (run, run / "checkpoint-6"))
    assert all(torch.equal(final[name], best[name]) for name in best)


@pytest.mark.parametrize("step", [2, 8, 10])
def test_a_resumed_run_stops_where_the_straight_one_did(
    step: int, stopped: tuple[dict[str, Any], Path], recipe: dict[str, Any], tmp_path: Path
) -> None:
    """Killed at step 8 it has one evaluation left, at step 10 none: it had stopped."""
    settings, run = stopped
    (tmp_path / "seen.jsonl").unlink()
    (tmp_path / "seen.jsonl").write_text(f'{{"event": "step", "step": {step}}}\n')
    copy = resumed_from(run, step, tmp_path)
    if step > 6:
        shutil.copytree(run / "checkpoint-6", copy / "checkpoint-6")
    train(recipe, "train.resume=auto", **settings, output=str(copy))
    assert log(copy, "loss") == log(run, "loss")
    assert log(copy, "eval_hump") == log(run, "eval_hump")
    final, expected = (load_file(folder / "adapter_model.safetensors") for folder in (copy, run))
    assert all(torch.equal(final[name], expected[name]) for name in expected)


def test_more_patience_goes_on(
    stopped: tuple[dict[str, Any], Path], recipe: dict[str, Any], tmp_path: Path
) -> None:
    settings, _ = stopped
    train(recipe, "train.resume=auto", **{**settings, "early_stopping": {"patience": 3}})
    assert list(log(tmp_path / "run", "loss")) == list(range(1, 13))


@pytest.mark.parametrize(("threshold", "last"), [(0.15, 10), (0.35, 6)])
def test_threshold_is_in_units_of_the_metric(
    threshold: float, last: int, recipe: dict[str, Any], tmp_path: Path
) -> None:
    """The metric is 0.1, 0.2, 0.5, 0.4, 0.4: above a threshold of 0.35 it never improves."""
    run = train(
        recipe,
        load_best=True,
        early_stopping={"patience": 2, "threshold": threshold},
        metrics=[str(tmp_path / "mine.py:hump")],
        best_metric="eval_hump",
        callbacks=[str(tmp_path / "mine.py:Watch")],
    ).output
    assert max(log(run, "loss")) == last


@pytest.mark.parametrize(
    ("greater", "best"), [(True, max), (False, min), (None, max)], ids=["greater", "smaller", "by name"]
)
def test_the_best_checkpoint_by_accuracy_is_what_is_left(
    greater: bool | None, best: Callable[..., int], recipe: dict[str, Any]
) -> None:
    """A learning rate that ruins the model, so that accuracies differ and the best is not the last."""
    run = train(
        recipe,
        "method={type: full}",
        "optim.lr=0.1",
        "optim.schedule=constant",
        metrics=["accuracy"],
        best_metric="eval_accuracy",
        greater_is_better=greater,
        load_best=True,
        epochs=2,
    ).output
    accuracies = log(run, "eval_accuracy")
    during = [json.loads(line) for line in (run / "trainer_log.jsonl").read_text().splitlines()]
    during = [line for line in during if "eval_accuracy" in line][:-1]
    values = {line["current_steps"]: line["eval_accuracy"] for line in during}
    chosen = best(values, key=lambda step: values[step])  # the first of equal ones, as transformers chooses
    assert values[chosen] != values[max(values)], "the case must have its best before its end"
    final, kept = (load_file(folder / "model.safetensors") for folder in (run, run / f"checkpoint-{chosen}"))
    assert all(torch.equal(final[name], kept[name]) for name in kept)
    assert accuracies[max(values)] == values[chosen], "the last evaluation is of the weights that are left"


def test_metrics_are_drawn(recipe: dict[str, Any]) -> None:
    run = train(recipe, metrics=["accuracy"], plots=True).output
    assert (run / "training_eval_accuracy.png").is_file()
    assert (
        json.loads((run / "all_results.json").read_text())["eval_accuracy"] == log(run, "eval_accuracy")[12]
    )


def test_a_best_metric_that_nobody_reports_ends_at_the_first_evaluation(recipe: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as error:
        train(recipe, metrics=["accuracy"], best_metric="eval_accuracies", load_best=True)
    assert str(error.value) == (
        "train.best_metric=eval_accuracies: the evaluation does not report it; it reports eval_loss, eval_perplexity, "
        "eval_accuracy, eval_runtime, eval_tokens_per_second"
    )


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"logging_dir": "logs"}, "train.extra.logging_dir: trackers write below the run directory"),
        (
            {"push_to_hub": True},
            "train.extra.push_to_hub: the finished model is uploaded with train.push_to_hub",
        ),
        (
            {"hub_token": "hf_x"},
            "train.extra.hub_token: the finished model is uploaded with train.push_to_hub",
        ),
        ({"report_to": "wandb"}, "train.extra.report_to: this has a place of its own in the recipe"),
    ],
)
def test_extra_keys_that_are_elsewhere(extra: dict[str, Any], message: str, recipe: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as error:
        train(recipe, extra=extra)
    assert str(error.value).startswith(message)
    assert not Path(recipe["train"]["output"]).exists()


def test_plain_training_arguments_pass(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "named.py").write_text(
        "from pathlib import Path\nfrom transformers import TrainerCallback\n\nclass Named(TrainerCallback):\n"
        "    def on_train_begin(self, args, state, control, **kwargs):\n"
        "        Path(args.output_dir, 'quickstart.json').write_text(f'{args.run_name} {args.logging_first_step}')\n"
    )
    run = train(
        recipe,
        extra={"run_name": "trial", "logging_first_step": True},
        log_every=5,
        callbacks=[str(tmp_path / "named.py:Named")],
    ).output
    assert (run / "quickstart.json").read_text() == "trial True"
    assert list(log(run, "loss")) == [1, 5, 10]


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("eval_loss", False),
        ("eval_rows_loss", False),
        ("eval_perplexity", False),
        ("eval_nll", False),
        ("eval_accuracy", True),
    ],
)
def test_which_way_is_better(metric: str, greater: bool, tmp_path: Path) -> None:
    settings = recipe_of(tmp_path, train={"best_metric": metric})
    assert settings.train.greater_is_better is greater
    assert training_arguments(settings, use_cpu=True).greater_is_better is greater
