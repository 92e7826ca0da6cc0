"""Runs whose adapters start from the data: every stage, resumed, checked, scored, with padded rows; and no look at data
where none is asked for."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import luthier
from luthier.arrange import first_batches, training_steps
from luthier.check.check import check
from luthier.environment import detect_hardware
from luthier.material import load_tokens, read_material
from luthier.methods.lora import Lora
from luthier.model.load import locate
from luthier.recipe.load import load_recipe
from luthier.recipe.resolve import resolve
from luthier.recipe.schema import Recipe
from luthier.score import score_file
from luthier.selfcheck.verb import selfcheck
from luthier.types import Batch, ModelError
from tests.tiny import chat_model, write_alpaca, write_feedback, write_pairs

STAGES = ("pt", "sft", "rm", "dpo", "kto")
INITS = {
    "eva": {"init": "eva", "eva_rho": 2.0},
    "corda": {"init": "corda", "corda_mode": "kpm"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> dict[str, Any]:
    write_alpaca(tmp_path / "rows.json", 24)
    write_pairs(tmp_path / "pairs.json", 16)
    write_feedback(tmp_path / "feedback.json", 16)
    texts = [{"text": " ".join(str(i) for i in range(n))} for n in range(3, 27)]
    (tmp_path / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    return {
        "model": {"path": str(model)},
        "data": {"train": ["rows.json"], "directory": str(tmp_path), "cache": str(tmp_path / "cache")},
        "method": {"type": "lora", "rank": 4, "calibration_samples": 12, **INITS["eva"]},
        "optim": {"type": "adamw", "lr": 0.01},
        "train": {
            "rows_per_device": 4,
            "epochs": 2,
            "log_every": 1,
            "output": str(tmp_path / "run"),
            "plots": False,
        },
    }


def of_stage(recipe: dict[str, Any], stage: str) -> dict[str, Any]:
    files: dict[str, Any] = {
        "pt": {"file_name": "texts.json", "columns": {"prompt": "text"}},
        "sft": "rows.json",
        "rm": {"file_name": "pairs.json", "ranking": True},
        "dpo": {"file_name": "pairs.json", "ranking": True},
        "kto": {"file_name": "feedback.json", "columns": {"kto_tag": "label"}},
    }
    return recipe | {"data": recipe["data"] | {"train": [files[stage]]}, "stage": {"type": stage}}


def with_init(recipe: dict[str, Any], init: str) -> dict[str, Any]:
    return recipe | {"method": {"type": "lora", "rank": 4, "calibration_samples": 12, **INITS[init]}}


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "trainer_log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def settings_of(recipe: dict[str, Any]) -> Recipe:
    return resolve(load_recipe(recipe), detect_hardware()).recipe


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_begins_at_the_base_and_learns(
    recipe: dict[str, Any], stage: str, init: str, tmp_path: Path
) -> None:
    asked = with_init(of_stage(recipe, stage), init)
    run = luthier.train(asked, quiet=True).output
    curve = losses(run)
    plain = of_stage(recipe, stage) | {"method": {"type": "lora", "rank": 4}}
    plain["train"] = recipe["train"] | {"output": str(tmp_path / "plain"), "max_steps": 1}
    first = losses(luthier.train(plain, quiet=True).output)[0]
    assert curve[0] == pytest.approx(first, abs=2e-5)  # B = 0, or taken off again: the base's own loss
    if stage in ("dpo", "rm"):
        assert first == pytest.approx(math.log(2), abs=0.3)
    if stage != "kto":  # which has a bound that its first steps do not move
        assert curve[-1] < curve[0]
    config = json.loads((run / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True and not config["eva_config"]
    auto = AutoModelForSequenceClassification if stage == "rm" else AutoModelForCausalLM
    arguments = {"num_labels": 1} if stage == "rm" else {}
    base = auto.from_pretrained(recipe["model"]["path"], dtype=torch.float32, **arguments)
    saved = load_file(run / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(base, str(run))
    for name, value in saved.items():
        if "lora_" in name:
            own = loaded.get_parameter(name.replace(".weight", ".default.weight"))
            assert torch.equal(own, value)


@pytest.mark.parametrize("init", INITS)
def test_resumed_equals_uninterrupted_and_does_not_look_again(
    recipe: dict[str, Any], init: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = with_init(recipe, init)
    asked["method"]["dropout"] = 0.1
    asked["train"] = recipe["train"] | {"save_every": 4}
    straight = luthier.train(asked, quiet=True).output
    shutil.copytree(straight, tmp_path / "resumed")
    for name in ("checkpoint-8", "checkpoint-12"):
        shutil.rmtree(tmp_path / "resumed" / name)
    calls = []
    monkeypatch.setattr(Lora, "calibrate", lambda self, *args: calls.append(args))
    asked["train"] |= {"output": str(tmp_path / "resumed"), "resume": "auto"}
    resumed = luthier.train(asked, quiet=True).output
    assert not calls
    first, second = (load_file(run / "adapter_model.safetensors") for run in (straight, resumed))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert losses(resumed)[-8:] == losses(straight)[-8:]
    counts = [json.loads((run / "run.json").read_text())["parameters"] for run in (straight, resumed)]
    assert counts[0] == counts[1]


def test_other_methods_do_not_touch_the_data(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the data was touched")

    monkeypatch.setattr("luthier.assemble.first_batches", touched)
    recipe["train"]["max_steps"] = 1
    for method in ({"type": "lora"}, {"type": "lora", "init": "pissa"}, {"type": "full"}):
        luthier.train(recipe | {"method": method}, ["train.overwrite=true"], quiet=True)
    with pytest.raises(AssertionError, match="touched"):
        luthier.train(recipe, ["train.overwrite=true"], quiet=True)


def test_the_first_samples_of_the_runs_order_are_looked_at(recipe: dict[str, Any]) -> None:
    settings = settings_of(recipe)
    tokenizer, _ = load_tokens(settings, locate(settings.model), lambda text: None)
    material = read_material(settings, tokenizer, lambda text: None)

    def rows(batches: list[Batch]) -> list[int]:
        return [index for batch in batches for _, index in batch.samples]

    steps = training_steps(settings, material, 1, 0)
    assert steps is not None
    order = rows([batch for step in range(len(steps)) for batch in steps[step]])
    for count in (1, 5, 24, 100):
        assert rows(first_batches(settings, material, count)) == order[:count]
    cut = settings.model_copy(update={"train": settings.train.model_copy(update={"tokens_per_pass": 128})})
    many = first_batches(cut, material, 100, least=30)
    assert len(many) > 2 and rows(many) == order  # whatever the passes are
    assert all(30 <= batch.num_tokens <= 128 for batch in many[:-1]) and many[-1].num_tokens >= 30
    # As many tokens as are wanted, where the rows have them.
    assert len(first_batches(cut, material, 100, least=10**6)) == 1


def test_another_seed_looks_at_other_rows_and_the_same_one_at_the_same(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    def started(name: str, seed: int) -> dict[str, Tensor]:
        recipe["train"] |= {"output": str(tmp_path / name), "seed": seed, "max_steps": 1}
        recipe["optim"] = {"type": "sgd", "lr": 1e-30}
        run = luthier.train(recipe, quiet=True).output
        return {k: v for k, v in load_file(run / "adapter_model.safetensors").items() if "lora_A" in k}

    first, again, other = started("a", 1), started("b", 1), started("c", 2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(name not in other or not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("init", INITS)
def test_padded_rows_start_from_the_same(recipe: dict[str, Any], init: str, tmp_path: Path) -> None:
    found = {}
    for rows in ("flat", "padded"):
        asked = with_init(recipe, init)
        asked["model"] = recipe["model"] | {"rows": rows}
        asked["train"] = recipe["train"] | {"output": str(tmp_path / rows), "max_steps": 2}
        found[rows] = losses(luthier.train(asked, quiet=True).output)
    assert found["padded"] == pytest.approx(found["flat"], abs=1e-3)


@pytest.mark.parametrize("init", INITS)
def test_the_users_own_checks_hold(recipe: dict[str, Any], init: str) -> None:
    result = selfcheck(with_init(recipe, init), quiet=True)
    assert result.holds, [outcome for outcome in result.outcomes if not outcome.holds]


def test_check_counts_what_would_train(recipe: dict[str, Any]) -> None:
    report = check(recipe)
    run = luthier.train(recipe, quiet=True).output
    trained = json.loads((run / "run.json").read_text())["parameters"]["trainable"]
    assert report.parameters is not None and report.parameters["all"].trainable == trained


def test_scores_come_from_the_saved_ranks(recipe: dict[str, Any], tmp_path: Path) -> None:
    asked = of_stage(recipe, "rm")
    asked["data"] |= {"eval": asked["data"]["train"]}
    result = luthier.train(asked, quiet=True)
    summary = score_file(result.output, tmp_path / "pairs.json").summary()
    assert summary["mean_margin"] == pytest.approx(result.metrics["eval_rewards/margins"], abs=1e-6)


def test_too_little_data_is_refused_before_anything_is_written(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe["method"] |= {"rank": 16, "calibration_samples": 1}
    write_alpaca(tmp_path / "rows.json", 1)
    (tmp_path / "rows.json").write_text(json.dumps([{"instruction": "a", "output": "b"}]))
    with pytest.raises(
        ModelError, match=r"looks for 32 directions, and the rows that it is shown have \d+ tokens"
    ):
        luthier.train(recipe, quiet=True)
    assert not (tmp_path / "run").exists()
