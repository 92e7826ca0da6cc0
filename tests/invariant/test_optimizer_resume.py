"""Every optimizer through a real run: resumed = uninterrupted, bit by bit; what is saved is what is evaluated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import luthier
from luthier.types import RecipeError
from tests.optimizers import CASES, WITHOUT_FORMULA, Case
from tests.tiny import chat_model, write_alpaca

ALL = CASES | WITHOUT_FORMULA


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("model"), attention_dropout=0.1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_alpaca(folder / "rows.json", 20)
    return folder


def recipe(case: Case, model: Path, data: Path, output: Path, **train: Any) -> dict[str, Any]:
    return {
        "model": {"path": str(model), "gradient_checkpointing": train.pop("gradient_checkpointing", False)},
        "data": {
            "train": ["rows.json"],
            "directory": str(data),
            "cache": str(data / "cache"),
            "dev_split": 4,
        },
        "method": {"type": "full"},
        "optim": {"lr": 3e-3, "weight_decay": 0.1, "warmup": 0.2, **case.optim},
        "train": {
            "rows_per_device": 4,
            "accumulation": 1 if case.train else 2,
            "max_steps": 6,
            "output": str(output),
            "log_every": 1,
            "save_every": 1,
            "eval_every": 2,
            "plots": False,
            **case.train,
            **train,
        },
    }


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def log(run: Path, key: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "trainer_log.jsonl").read_text().splitlines()]
    return {line["current_steps"]: line[key] for line in lines if key in line}


def resumed_from(run: Path, step: int, base: dict[str, Any], folder: Path) -> Path:
    folder.mkdir()
    for name in ("recipe.yaml", "trainer_log.jsonl"):
        shutil.copy(run / name, folder / name)
    shutil.copytree(run / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    luthier.train(base, [f"train.output={folder}", "train.resume=auto"], quiet=True)
    return folder


@pytest.mark.parametrize("name", ALL)
def test_resume_is_bitwise(name: str, model: Path, cache: Path, tmp_path: Path) -> None:
    case = ALL[name]
    if not case.installed:
        pytest.skip(f"{case.needs} is not installed")
    base = recipe(case, model, cache, tmp_path / "straight")
    straight = luthier.train(base, quiet=True).output
    expected = weights(straight)
    start = load_file(model / "model.safetensors")
    assert any(not torch.equal(tensor, start[key]) for key, tensor in expected.items())
    for step in (1, 3):
        resumed = resumed_from(straight, step, base, tmp_path / f"from-{step}")
        assert log(resumed, "loss") == log(straight, "loss")
        for key, tensor in weights(resumed).items():
            assert torch.equal(tensor, expected[key]), (step, key)


@pytest.mark.parametrize("name", ["galore", "badam", "schedule_free", "muon", "apollo_random"])
def test_without_the_state_the_end_is_another(
    name: str, model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The equality above could fail: an optimizer that forgets is noticed."""
    base = recipe(ALL[name], model, cache, tmp_path / "straight", save_every=3, eval_every=None)
    straight = luthier.train(base, quiet=True).output
    kind = (
        "luthier.optim."
        + {
            "muon": "combined.Combined",
            "schedule_free": "schedule_free.ScheduleFreeAdamW",
            "galore": "galore.GaLore",
            "apollo_random": "apollo.Apollo",
            "badam": "badam.BlockAdam",
        }[name]
    )
    monkeypatch.setattr(f"{kind}.load_state_dict", lambda self, state: None)
    resumed = resumed_from(straight, 3, base, tmp_path / "resumed")
    assert any(not torch.equal(tensor, weights(straight)[key]) for key, tensor in weights(resumed).items())


def test_schedule_free_evaluates_and_saves_the_average(model: Path, cache: Path, tmp_path: Path) -> None:
    """The loss at the end is that of the saved weights, loaded by a run that only evaluates."""
    base = recipe(CASES["schedule_free"], model, cache, tmp_path / "run")
    base["data"] |= {"eval": ["rows.json"], "dev_split": 0}
    trained = luthier.train(base, quiet=True)
    base["data"] |= {"train": []}
    only = [f"model.path={trained.output}", "train.eval_only=true", f"train.output={tmp_path / 'only'}"]
    evaluated = luthier.train(base, only, quiet=True)
    assert evaluated.metrics["eval_loss"] == pytest.approx(trained.metrics["eval_loss"], rel=1e-6)


def test_evaluations_and_checkpoints_change_no_step_of_schedule_free(
    model: Path, cache: Path, tmp_path: Path
) -> None:
    case = CASES["schedule_free"]
    often = luthier.train(recipe(case, model, cache, tmp_path / "often"), quiet=True).output
    seldom = recipe(case, model, cache, tmp_path / "seldom", save_every=None, eval_every=None)
    seldom_weights = weights(luthier.train(seldom, quiet=True).output)
    for key, tensor in weights(often).items():
        assert torch.equal(tensor, seldom_weights[key]), key


def test_the_best_checkpoint_of_schedule_free_is_saved_as_it_was(
    model: Path, cache: Path, tmp_path: Path
) -> None:
    """What is loaded at the end is the average already."""
    base = recipe(CASES["schedule_free"], model, cache, tmp_path / "run", load_best=True, save_every=2)
    base["optim"] |= {"lr": 0.3, "warmup": 0.0}  # it gets worse
    result = luthier.train(base, quiet=True)
    state = json.loads((result.output / "trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"])
    for key, tensor in weights(best).items():
        assert torch.equal(tensor, weights(result.output)[key]), key


def test_badam_trains_the_blocks_in_turn(model: Path, cache: Path, tmp_path: Path) -> None:
    """Between checkpoints only the active layer changes, with gradient checkpointing too."""
    base = recipe(CASES["badam"], model, cache, tmp_path / "run", gradient_checkpointing=True)
    base["optim"] |= {"warmup": 0.0}
    run = luthier.train(base, quiet=True).output
    before = load_file(model / "model.safetensors")
    for step in range(1, 7):
        after = weights(run / f"checkpoint-{step}")
        changed = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
        active = f"model.layers.{(step - 1) // 2 % 2}."
        assert changed == {key for key in after if key.startswith(active)}, step
        before = after


@pytest.mark.parametrize("asynchronous", [True, False])
def test_checkpoints_of_badam_hold_what_was_frozen(
    asynchronous: bool, model: Path, cache: Path, tmp_path: Path
) -> None:
    base = recipe(CASES["badam"], model, cache, tmp_path / "run", async_save=asynchronous, save_every=2)
    run = luthier.train(base, quiet=True).output
    last = weights(run / "checkpoint-6")
    for key, tensor in weights(run).items():
        assert torch.equal(tensor, last[key]), key


@pytest.mark.parametrize("name", ["galore", "adamw", "badam", "muon"])
def test_clipping_bounds_the_update(name: str, model: Path, cache: Path, tmp_path: Path) -> None:
    """Gradients clipped to almost nothing, far below eps, move almost nothing."""
    moved = []
    for norm in (1e-9, 0):
        case = ALL[name]
        base = recipe(case, model, cache, tmp_path / f"run-{norm}", save_every=None, eval_every=None)
        base["optim"] |= {"max_grad_norm": norm, "weight_decay": 0.0, "eps": 1e-3}
        run = luthier.train(base, quiet=True).output
        start, end = load_file(model / "model.safetensors"), weights(run)
        moved.append(max(float((end[key] - start[key]).abs().max()) for key in end if "norm" in key))
    assert moved[0] < 1e-3 * moved[1]


def test_updates_in_backward_need_steps_of_one_pass(model: Path, cache: Path, tmp_path: Path) -> None:
    base = recipe(CASES["adalomo"], model, cache, tmp_path / "run", tokens_per_pass=40)
    with pytest.raises(
        RecipeError, match=r"optim\.type=adalomo updates parameters in the backward pass, so a step"
    ):
        luthier.train(base, quiet=True)


@pytest.mark.parametrize("name", ["galore", "apollo"])
def test_layerwise_equals_the_ordinary_step(name: str, model: Path, cache: Path, tmp_path: Path) -> None:
    """One pass without clipping: the same updates, only earlier, with tied uses and checkpointing."""
    ends = []
    for layerwise in (False, True):
        base = recipe(
            WITHOUT_FORMULA["apollo_layerwise"] if name == "apollo" else CASES["galore_layerwise"],
            model,
            cache,
            tmp_path / f"run-{layerwise}",
            gradient_checkpointing=True,
            save_every=None,
            eval_every=None,
        )
        base["optim"] |= {"layerwise": layerwise}
        ends.append(weights(luthier.train(base, quiet=True).output))
    for key, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][key], tensor, rtol=1e-5, atol=1e-6)
