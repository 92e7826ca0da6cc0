"""LoftQ: adapters that start from what rounding took off the base, against PEFT's, the formula and the plain model."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, replace_lora_weights_loftq
from peft.utils import loftq_utils
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import luthier
from luthier.assemble import build_model
from luthier.environment import detect_hardware
from luthier.material import load_tokens
from luthier.methods.lora import load_adapter, lora_layers
from luthier.model.load import load_model, locate
from luthier.model.quantized_layers import dequantized
from luthier.recipe.load import load_recipe
from luthier.recipe.resolve import resolve
from luthier.types import ModelError, RecipeError
from tests.tiny import chat_model, write_alpaca, write_pairs

NF4 = {"type": "bitsandbytes", "bits": 4}
KINDS = {
    "nf4": NF4,
    "fp4": {**NF4, "quant_type": "fp4", "double": False},
    "int8": {"type": "bitsandbytes", "bits": 8},
    "torchao": {"type": "torchao", "name": "int8_weight_only"},
    "float8": {"type": "torchao", "name": "float8_weight_only"},
    "hqq": {"type": "hqq", "bits": 4, "group_size": 16},
}
IDS = torch.tensor([[5, 9, 70, 33, 8, 101, 4, 60, 12]])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("model"), hidden_size=64, intermediate_size=128, head_dim=16)


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> dict[str, Any]:
    write_alpaca(tmp_path / "rows.json", 24)
    return {
        "model": {"path": str(model), "quantization": NF4},
        "data": {"train": ["rows.json"], "directory": str(tmp_path), "cache": str(tmp_path / "cache")},
        "method": {"type": "lora", "rank": 8, "init": "loftq"},
        "optim": {"type": "adamw", "lr": 0.01},
        "train": {
            "rows_per_device": 4,
            "epochs": 2,
            "log_every": 1,
            "output": str(tmp_path / "run"),
            "plots": False,
        },
    }


def built(recipe: dict[str, Any]) -> tuple[PeftModel, Any]:
    settings = resolve(load_recipe(recipe), detect_hardware()).recipe
    source = locate(settings.model)
    _, vocabulary = load_tokens(settings, source, lambda text: None)
    trained, method = build_model(settings, source, detect_hardware(), vocabulary)
    assert isinstance(trained, PeftModel)
    return trained, method


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found = model.eval()(IDS, attention_mask=torch.ones_like(IDS)).logits
    assert isinstance(found, Tensor)
    return found


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "trainer_log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("kind", KINDS)
def test_the_start_is_the_best_of_its_rank_and_nearer_to_the_plain_model(
    recipe: dict[str, Any], kind: str, model: Path
) -> None:
    recipe["model"]["quantization"] = KINDS[kind]
    adapted, _ = built(recipe)
    files, layers = load_file(model / "model.safetensors"), lora_layers(adapted)
    assert len(layers) == 14
    for name, layer in layers.items():
        weight = files[f"{name.removeprefix('base_model.model.')}.weight"]
        lost = weight - dequantized(layer.get_base_layer()).float()
        start = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        left, before = (lost - start).norm(), lost.norm()
        assert left < 0.95 * before, name
        # Eckart-Young: the smallest singular values are what no matrix of this rank can take.
        torch.testing.assert_close(left, torch.linalg.svdvals(lost)[8:].norm(), rtol=1e-3, atol=1e-6)
    plain = logits(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    with adapted.disable_adapter():
        rounded = (logits(adapted) - plain).norm()
    assert (logits(adapted) - plain).norm() < rounded


def test_the_fast_factors_are_near_the_exact_ones(recipe: dict[str, Any], model: Path) -> None:
    files, left = load_file(model / "model.safetensors"), {}
    for iterations in (None, 4):
        recipe["method"]["init_iterations"] = iterations
        for name, layer in lora_layers(built(recipe)[0]).items():
            weight = files[f"{name.removeprefix('base_model.model.')}.weight"]
            lost = weight - dequantized(layer.get_base_layer()).float()
            start = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            left[iterations, name] = float(((lost - start).norm() / lost.norm()).detach())
    assert all(
        left[None, name] < left[4, name] < min(0.95, 1.02 * left[None, name])
        for kind, name in left
        if kind is None
    )


class _OnTheCpu(Tensor):
    """PEFT's function moves weights to a GPU, whether there is one or not."""

    def to(self, device: Any = None, dtype: Any = None) -> Tensor:  # type: ignore[override]
        return self.as_subclass(Tensor).to(dtype=dtype)


def test_it_is_pefts(recipe: dict[str, Any], model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's leaves the scale out of account; at 1 both are the same."""
    recipe["method"]["alpha"] = 8
    ours, _ = built(recipe)
    theirs, _ = built(recipe | {"method": {**recipe["method"], "init": "default"}})
    read = loftq_utils._SafetensorLoader.get_tensor
    monkeypatch.setattr(
        loftq_utils._SafetensorLoader,
        "get_tensor",
        lambda self, name: read(self, name).as_subclass(_OnTheCpu),
    )
    replace_lora_weights_loftq(theirs, str(model / "model.safetensors"))
    expected, found = lora_layers(theirs), lora_layers(ours)
    for name, layer in expected.items():
        for part in ("lora_A", "lora_B"):
            ours_part, theirs_part = (getattr(one, part)["default"].weight for one in (found[name], layer))
            torch.testing.assert_close(ours_part, theirs_part, rtol=1e-3, atol=1e-5)
        assert theirs_part.abs().max() > 1e-3
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)


def test_it_trains_and_its_folder_goes_on_the_quantized_base(recipe: dict[str, Any], tmp_path: Path) -> None:
    result = luthier.train(recipe, quiet=True)
    curve = losses(result.output)
    assert curve[-1] < 0.95 * curve[0]
    settings = load_recipe(result.output / "recipe.yaml").recipe
    base = load_model(settings.model, locate(settings.model), torch.device("cpu"))
    torch.manual_seed(1)
    saved = logits(load_adapter(base, result.output))
    # What a run says that only evaluates the finished adapter is what the folder says.
    again = recipe | {"method": {"type": "lora", "adapters": [str(result.output)]}}
    assert torch.equal(logits(built(again)[0]), saved)
    assert (saved - logits(built(recipe)[0])).abs().max() > 1e-3


def test_resumed_equals_uninterrupted(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["train"]["save_every"] = 4
    straight = luthier.train(recipe, quiet=True).output
    shutil.copytree(straight, tmp_path / "resumed")
    for name in ("checkpoint-8", "checkpoint-12"):
        shutil.rmtree(tmp_path / "resumed" / name)
    recipe["train"] |= {"output": str(tmp_path / "resumed"), "resume": "auto"}
    resumed = luthier.train(recipe, quiet=True).output
    first, second = (load_file(run / "adapter_model.safetensors") for run in (straight, resumed))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("precompute", [False, True])
def test_what_preference_learning_starts_from_is_the_start(
    recipe: dict[str, Any], precompute: bool, tmp_path: Path
) -> None:
    """With the adapter off the model is another one: the reference is a copy of the adapter as it began."""
    write_pairs(tmp_path / "pairs.json", 8)
    recipe["data"] |= {"train": [{"file_name": "pairs.json", "ranking": True}]}
    recipe["train"] |= {"max_steps": 2}
    recipe["stage"] = {"type": "dpo", "reference": "precompute" if precompute else "start"}
    curve = losses(luthier.train(recipe, quiet=True).output)
    assert curve[0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(curve[1] - math.log(2)) > 1e-4
    recipe["stage"] = {"type": "dpo", "reference": "base"}
    recipe["train"]["output"] = str(tmp_path / "base")
    assert abs(losses(luthier.train(recipe, quiet=True).output)[0] - math.log(2)) > 1e-6


def test_refused_without_a_quantized_base(recipe: dict[str, Any]) -> None:
    del recipe["model"]["quantization"]
    with pytest.raises(
        RecipeError, match=r"init: loftq makes up for the rounding of the base.*model.quantization"
    ):
        load_recipe(recipe)


def test_refused_where_the_files_do_not_hold_the_weights(
    recipe: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    recipe["model"]["path"] = str(folder)
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no safetensors; save it as such"):
        built(recipe)
    (folder / "pytorch_model.bin").unlink()
    # Files that leave the name of the backbone out are read too.
    save_file(
        {name.removeprefix("model."): value for name, value in weights.items()}, folder / "model.safetensors"
    )
    expected = lora_layers(built(recipe | {"model": {"path": str(model), "quantization": NF4}})[0])
    for name, layer in lora_layers(built(recipe)[0]).items():
        assert torch.equal(layer.lora_B["default"].weight, expected[name].lora_B["default"].weight)


def test_weights_in_several_files_are_found(recipe: dict[str, Any], model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(model, folder)
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).save_pretrained(
        folder, max_shard_size="80KB"
    )
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    expected = lora_layers(built(recipe)[0])
    recipe["model"] = {"path": str(folder), "quantization": NF4}
    for name, layer in lora_layers(built(recipe)[0]).items():
        assert torch.equal(layer.lora_B["default"].weight, expected[name].lora_B["default"].weight)
