"""Adapters on quantized bases, through the command's own path: they learn, resume, reload and are refused rightly."""

from __future__ import annotations

import json
import math
import shutil
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import luthier
from luthier.assemble import build_model
from luthier.check.memory import weight_bytes
from luthier.environment import detect_hardware
from luthier.material import load_tokens
from luthier.methods.lora import load_adapter
from luthier.model.load import load_model, locate
from luthier.recipe.load import load_recipe
from luthier.recipe.resolve import resolve
from luthier.score import score_file
from luthier.selfcheck.verb import selfcheck
from luthier.types import CheckpointError, ModelError
from tiny import chat_model, write_alpaca, write_pairs

NF4 = {"type": "bitsandbytes", "bits": 4}
INT8 = {"type": "bitsandbytes", "bits": 8}


def needs(library: str, *values: object) -> Any:
    absent = util.find_spec(library) is None
    return pytest.param(*values, marks=pytest.mark.skipif(absent, reason=f"{library} is not installed"))


# bitsandbytes comes with the tests.
KINDS = [
    pytest.param(NF4, id="nf4"),
    pytest.param({**NF4, "quant_type": "fp4", "double": False}, id="fp4"),
    pytest.param(INT8, id="int8"),
    needs("torchao", {"type": "torchao", "name": "int8_weight_only"}),
    needs("torchao", {"type": "torchao", "name": "float8_weight_only"}),
    needs("hqq", {"type": "hqq", "bits": 4, "group_size": 16}),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Rows of whole blocks of 64 weights.
    return chat_model(tmp_path_factory.mktemp("model"), hidden_size=64, intermediate_size=128, head_dim=16)


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> dict[str, Any]:
    write_alpaca(tmp_path / "rows.json", 24)
    return {
        "model": {"path": str(model), "quantization": NF4},
        "data": {"train": ["rows.json"], "directory": str(tmp_path), "cache": str(tmp_path / "cache")},
        "method": {"type": "lora", "rank": 4, "dropout": 0.1},
        "optim": {"type": "adamw", "lr": 0.02},
        "train": {
            "rows_per_device": 4,
            "epochs": 2,
            "log_every": 1,
            "output": str(tmp_path / "run"),
            "plots": False,
        },
    }


def changed(recipe: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    return {name: {**value, **sections.pop(name, {})} for name, value in recipe.items()} | sections


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "trainer_log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


IDS = torch.tensor([[5, 9, 70, 33, 8, 101, 4, 60, 12]])


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found = model.eval()(IDS, attention_mask=torch.ones_like(IDS)).logits
    assert isinstance(found, Tensor)
    return found


def reloaded(run: Path) -> Any:
    """The adapter of a run on its base, loaded anew as its recipe says."""
    settings = load_recipe(run / "recipe.yaml").recipe
    base = load_model(settings.model, locate(settings.model), torch.device("cpu"))
    return load_adapter(base, run)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_learns_on_a_quantized_base_and_its_folder_gives_the_evaluated_loss(
    recipe: dict[str, Any], kind: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copy(tmp_path / "rows.json", tmp_path / "again.json")
    asked = changed(
        recipe, model={"quantization": kind}, data={"eval": ["again.json"]}, method={"dropout": 0.0}
    )
    result = luthier.train(asked, quiet=True)
    curve = losses(result.output)
    assert curve[-1] < 0.95 * curve[0]
    record = json.loads((result.output / "run.json").read_text())["quantized"]
    assert record["layers"] == 14 and 0.3 < record["weights"] / record["total"] < 0.9
    names = load_file(result.output / "adapter_model.safetensors")
    assert len(names) == 28 and all("lora_" in name for name in names)
    # A run that only evaluates what was saved finds the same loss, to the last bit.
    again = changed(asked, method={"adapters": [str(result.output)]})
    again["train"] |= {"eval_only": True, "output": str(tmp_path / "evaluated")}
    assert luthier.train(again, quiet=True).metrics["eval_loss"] == result.metrics["eval_loss"]
    # And it is the loss on this base, not on the plain one.
    again["model"] = {"path": recipe["model"]["path"]}
    again["train"]["output"] = str(tmp_path / "plain")
    assert luthier.train(again, quiet=True).metrics["eval_loss"] != result.metrics["eval_loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_adapter_gives_the_logits_of_training(recipe: dict[str, Any], kind: dict[str, Any]) -> None:
    settings = resolve(load_recipe(changed(recipe, model={"quantization": kind})), detect_hardware()).recipe
    source = locate(settings.model)
    _, vocabulary = load_tokens(settings, source, lambda text: None)
    trained, method = build_model(settings, source, detect_hardware(), vocabulary)
    assert isinstance(trained, PeftModel)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    expected = logits(trained)
    folder = Path(settings.train.output)
    method.save(trained, folder)
    base = load_model(settings.model, source, torch.device("cpu"))
    assert torch.equal(logits(load_adapter(base, folder)), expected)
    plain = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    assert (logits(load_adapter(plain, folder)) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("kind", [pytest.param(NF4, id="nf4"), pytest.param(INT8, id="int8")])
def test_resumed_equals_uninterrupted_on_a_quantized_base(
    recipe: dict[str, Any], kind: dict[str, Any], tmp_path: Path
) -> None:
    asked = changed(
        recipe, model={"quantization": kind, "gradient_checkpointing": True}, train={"save_every": 4}
    )
    straight = luthier.train(asked, quiet=True).output
    shutil.copytree(straight, tmp_path / "resumed")
    for name in ("checkpoint-8", "checkpoint-12"):
        shutil.rmtree(tmp_path / "resumed" / name)
    asked["train"] |= {"output": str(tmp_path / "resumed"), "resume": "auto"}
    resumed = luthier.train(asked, quiet=True).output
    first, second = (load_file(run / "adapter_model.safetensors") for run in (straight, resumed))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses(resumed)[-8:] == losses(straight)[-8:]
    # Another quantization is another run.
    asked["model"] |= {"quantization": {**NF4, "quant_type": "fp4"}}
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-12")
    with pytest.raises(CheckpointError, match=r"model\.quantization was"):
        luthier.train(asked, quiet=True)


def test_checkpointed_layers_give_the_same_adapter(recipe: dict[str, Any], tmp_path: Path) -> None:
    asked = changed(recipe, method={"dropout": 0.0})
    plain = luthier.train(asked, quiet=True).output
    asked["model"] |= {"gradient_checkpointing": True}
    asked["train"] |= {"output": str(tmp_path / "checkpointed")}
    recomputed = luthier.train(asked, quiet=True).output
    torch.testing.assert_close(losses(recomputed), losses(plain), rtol=1e-5, atol=1e-6)


def test_files_that_are_quantized_already_train_as_they_are(
    recipe: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    packed = AutoModelForCausalLM.from_pretrained(
        model,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
        device_map={"": "cpu"},
        dtype=torch.float32,
    )
    folder = tmp_path / "packed"
    shutil.copytree(model, folder)
    (folder / "model.safetensors").unlink()
    packed.save_pretrained(folder)
    del recipe["model"]["quantization"]
    there = changed(recipe, model={"path": str(folder)})
    here = changed(recipe, model={"quantization": NF4})
    here["train"] = here["train"] | {"output": str(tmp_path / "quantized_here")}
    assert losses(luthier.train(there, quiet=True).output) == losses(luthier.train(here, quiet=True).output)
    with pytest.raises(ModelError, match=r"quantized already \(bitsandbytes\); leave model.quantization out"):
        luthier.train(changed(there, model={"quantization": NF4}, train={"overwrite": True}), quiet=True)
    with pytest.raises(ModelError, match=r"is quantized, and rounded weights cannot train"):
        there["method"] = {"type": "full"}
        luthier.train(changed(there, train={"overwrite": True}), quiet=True)


def test_a_quantized_reference_is_another_model_than_the_plain_one(
    recipe: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    write_pairs(tmp_path / "pairs.json", 8)
    recipe["data"] |= {"train": [{"file_name": "pairs.json", "ranking": True}]}
    recipe["method"]["dropout"] = 0.0
    recipe["train"] |= {"max_steps": 2}
    found = {}
    for name, reference in {
        "base": "start",  # adapters off: the quantized base itself
        "same": {"path": str(model), "quantization": NF4},
        "plain": {"path": str(model)},
        "precomputed": {"path": str(model), "quantization": NF4, "precompute": True},
    }.items():
        asked = recipe | {"stage": {"type": "dpo", "reference": reference, "share_prompts": False}}
        asked["train"] = recipe["train"] | {"output": str(tmp_path / name)}
        found[name] = losses(luthier.train(asked, quiet=True).output)
    assert found["base"][0] == pytest.approx(math.log(2), abs=1e-6)  # the policy is its reference
    assert found["same"] == found["base"]
    assert found["precomputed"] == pytest.approx(found["base"], abs=1e-6)
    assert abs(found["plain"][0] - found["base"][0]) > 1e-5


def test_scores_come_from_the_quantized_base_of_the_run(recipe: dict[str, Any], tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.json", 12)
    pairs = [{"file_name": "pairs.json", "ranking": True}]
    recipe["data"] |= {"train": pairs, "eval": [{"file_name": "pairs.json", "ranking": True}]}
    result = luthier.train(recipe | {"stage": {"type": "rm"}}, quiet=True)
    assert json.loads((result.output / "run.json").read_text())["quantized"]["layers"] == 14
    summary = score_file(result.output, tmp_path / "pairs.json").summary()
    assert summary["mean_margin"] == pytest.approx(result.metrics["eval_rewards/margins"], abs=1e-6)


def test_check_counts_the_packed_weights(recipe: dict[str, Any]) -> None:
    told = {}
    for name, kind in {"plain": None, "nf4": NF4, "int8": INT8}.items():
        asked = changed(recipe, model={"quantization": kind})
        settings = resolve(load_recipe(asked), detect_hardware()).recipe
        told[name] = weight_bytes(load_model(settings.model, locate(settings.model), torch.device("cpu")))
    assert told["nf4"] < told["int8"] < told["plain"]


def test_the_users_own_checks_hold_on_a_quantized_base(recipe: dict[str, Any]) -> None:
    result = selfcheck(recipe, quiet=True)
    assert result.holds, [outcome for outcome in result.outcomes if not outcome.holds]
    saved = next(outcome for outcome in result.outcomes if outcome.check == "saved")
    assert saved.measured < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param(NF4, id="nf4"), pytest.param(INT8, id="int8")])
def test_qlora_trains_a_real_model(kind: dict[str, Any], smollm2: Path, tmp_path: Path) -> None:
    write_alpaca(tmp_path / "rows.json", 24)
    result = luthier.train(
        {
            "model": {"path": str(smollm2), "quantization": kind},
            "data": {"train": ["rows.json"], "directory": str(tmp_path), "cache": str(tmp_path / "cache")},
            "method": {"type": "lora", "rank": 8},
            "optim": {"type": "adamw", "lr": 1e-3},
            "train": {"rows_per_device": 4, "max_steps": 4, "log_every": 1, "output": str(tmp_path / "run")},
        },
        ["train.plots=false"],
        quiet=True,
    )
    curve = losses(result.output)
    # Without its quantized weights being right an instruct model's loss on English would be near ln 49152 = 10.8.
    assert curve[0] < 4 and curve[-1] < 0.9 * curve[0]
    record = json.loads((result.output / "run.json").read_text())["quantized"]
    assert record["layers"] == 210 and record["weights"] == 106_168_320
