"""Schedules of one's own, shares of warmup_stable_decay, and those that step at evaluations; each through a resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import get_scheduler

import luthier
from luthier.optim.build import build_optimizer
from luthier.optim.schedule import build_schedule
from luthier.recipe.load import load_recipe
from luthier.recipe.schema import SgdSpec
from luthier.types import RecipeError
from tests.tiny import chat_model, write_alpaca


def rates(spec: SgdSpec, steps: int, function: Any = None) -> list[float]:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = build_optimizer(
        spec, [{"params": [parameter], "weight_decay": 0.0}], torch.nn.ParameterList([parameter])
    )
    schedule, values = build_schedule(spec, optimizer, steps, function), []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return values


def theirs(steps: int, warmup: int, **options: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = get_scheduler(
        "warmup_stable_decay",
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=steps,
        scheduler_specific_kwargs=options,
    )
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return values


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"num_stable_steps": 5, "num_decay_steps": 12}),
        ({"num_decay_steps": 0.25}, {"num_stable_steps": 12, "num_decay_steps": 5}),
        ({"num_decay_steps": 0.26, "min_lr_ratio": 0.1}, {"num_stable_steps": 11, "num_decay_steps": 6, "min_lr_ratio": 0.1}),
        ({"num_stable_steps": 0.5}, {"num_stable_steps": 10, "num_decay_steps": 7}),
        ({"num_decay_steps": 4, "decay_type": "1-sqrt"}, {"num_stable_steps": 13, "num_decay_steps": 4, "decay_type": "1-sqrt"}),
    ],
)  # fmt: skip
def test_warmup_stable_decay(options: dict[str, Any], expected: dict[str, Any]) -> None:
    """Of 20 steps 3 warm up; without options a third of the others is stable."""
    spec = SgdSpec(lr=0.5, schedule="warmup_stable_decay", schedule_options=options, warmup=3)
    assert rates(spec, 20) == theirs(20, 3, **expected)


def test_cosine_with_floor() -> None:
    spec = SgdSpec(lr=0.5, schedule="cosine_with_min_lr", schedule_options={"min_lr": 0.05})
    values = rates(spec, 50)
    assert values[0] == 0.5
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(0.05, abs=1e-3)


def test_a_function_gives_factors() -> None:
    spec = SgdSpec(lr=0.5, schedule_function="x.py:y", schedule_options={"floor": 0.25})
    values = rates(spec, 4, lambda step, num_steps, floor: max(floor, 1 - step / num_steps))
    assert values == [0.5, 0.375, 0.25, 0.125]


@pytest.mark.parametrize("value", [None, -1.0, float("nan"), True, "1"])
def test_what_is_no_factor_is_told(value: Any) -> None:
    spec = SgdSpec(schedule_function="x.py:y")
    with pytest.raises(RecipeError, match=r"optim\.schedule_function=x\.py:y at step 0 of 4 gave"):
        rates(spec, 4, lambda step, num_steps: value)


def test_a_function_that_fails_is_told() -> None:
    with pytest.raises(RecipeError, match=r"at step 2 of 4: ZeroDivisionError"):
        rates(SgdSpec(schedule_function="x.py:y"), 4, lambda step, num_steps: 1 / (2 - step))


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ("{schedule_function: a.py:f, warmup: 3}", "schedule_function decides about the first steps too"),
        ("{schedule: greedy, warmup: 3}", "warmup: schedule greedy has none"),
        ("{schedule: greedy}", "greedy takes its steps at evaluations; give train.eval_every"),
        ("{type: schedule_free, schedule: cosine}", "schedule_free takes the place of cosine"),
        ("{type: galore, layerwise: true}", "write max_grad_norm: 0"),
        ("{type: adalomo, max_grad_norm: 1}", "write max_grad_norm: 0"),
        ("{type: galore}", "saves memory where whole weights train"),
        ("{type: badam, order: random, start_block: 1}", "start_block: the order is random"),
    ],
)
def test_settings_that_do_not_fit(optim: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(f"model: {{path: m}}\ndata: {{train: [a]}}\noptim: {optim}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "train", [{"precision": "fp16"}, {"bad_numbers": {"action": "skip"}}, {"fit_memory": True}]
)
def test_what_needs_gradients_after_backward(train: dict[str, Any]) -> None:
    tree = {"model": {"path": "m"}, "data": {"train": ["a"]}, "optim": {"type": "adalomo"}, "train": train}
    with pytest.raises(RecipeError, match="by the end of the backward pass"):
        load_recipe(tree)


SCHEDULES: dict[str, dict[str, Any]] = {
    "function": {"schedule_function": "rates.py:halves", "schedule_options": {"every": 2}},
    "reduce_lr_on_plateau": {
        "schedule": "reduce_lr_on_plateau",
        "schedule_options": {"patience": 0, "factor": 0.5, "threshold": 10.0},
    },
    "greedy": {"schedule": "greedy", "schedule_options": {"patience": 0, "factor": 0.5, "max_lr": 1.0}},
    "warmup_stable_decay": {"schedule": "warmup_stable_decay", "warmup": 1},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_survives_a_resume(name: str, tmp_path: Path) -> None:
    base = chat_model(tmp_path / "model")
    write_alpaca(tmp_path / "rows.json", 20)
    (tmp_path / "rates.py").write_text(
        "def halves(step, num_steps, every):\n    return 0.5 ** (step // every)\n"
    )
    tree: dict[str, Any] = {
        "model": {"path": str(base)},
        "data": {
            "train": ["rows.json"],
            "directory": str(tmp_path),
            "cache": str(tmp_path / "cache"),
            "dev_split": 4,
        },
        "method": {"type": "lora", "rank": 2},
        "optim": {"lr": 0.01, **SCHEDULES[name]},
        "train": {"max_steps": 6, "save_every": 1, "eval_every": 1, "log_every": 1, "plots": False},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(tree))
    straight = luthier.train(file, [f"train.output={tmp_path / 'straight'}"], quiet=True).output
    lines = [json.loads(line) for line in (straight / "trainer_log.jsonl").read_text().splitlines()]
    seen = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert len(set(seen)) > 1
    if name == "function":
        assert seen == pytest.approx([0.01 * 0.5 ** (step // 2) for step in range(6)])
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    for part in ("recipe.yaml", "trainer_log.jsonl"):
        shutil.copy(straight / part, resumed / part)
    shutil.copytree(straight / "checkpoint-3", resumed / "checkpoint-3")
    luthier.train(file, [f"train.output={resumed}", "train.resume=auto"], quiet=True)
    expected = load_file(straight / "adapter_model.safetensors")
    for key, tensor in load_file(resumed / "adapter_model.safetensors").items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("rates.py:none", r"optim\.schedule_function: rates\.py has no none"),
        ("rates.py:Kind", "is the class Kind; a schedule is a function"),
        ("rates", "write package.module:Name or file.py:Name"),
    ],
)
def test_a_function_that_cannot_be_found(
    reference: str, message: str, tmp_path: Path, monkeypatch: Any
) -> None:
    from luthier.trainer.plugins import load_schedule

    (tmp_path / "rates.py").write_text("class Kind:\n    pass\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=message):
        load_schedule(reference, None)


def test_a_missing_library_is_told_with_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import util

    found = util.find_spec
    monkeypatch.setattr(
        "luthier.environment.util.find_spec", lambda name: None if name == "bitsandbytes" else found(name)
    )
    write_alpaca(tmp_path / "rows.json", 8)
    tree = {
        "model": {"path": str(chat_model(tmp_path / "model"))},
        "data": {"train": ["rows.json"], "directory": str(tmp_path), "cache": str(tmp_path / "cache")},
        "optim": {"bits": 8},
        "train": {"output": str(tmp_path / "run")},
    }
    with pytest.raises(
        RecipeError,
        match=r"optim\.bits=8 .* needs the package bitsandbytes.*pip install 'luthier\[bitsandbytes\]'",
    ):
        luthier.train(tree, quiet=True)
    assert not (tmp_path / "run").exists()
