"""LLaMA-Factory's quantization keys: what each becomes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.recipe.load import LoadedRecipe, load_recipe
from luthier.recipe.schema import BitsAndBytesSpec, HqqSpec, ReferenceSpec
from luthier.types import RecipeError


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def translated(**values: Any) -> LoadedRecipe:
    tree = {
        "model_name_or_path": "m",
        "template": "qwen",
        "do_train": True,
        "dataset": "a",
        "stage": "sft",
        "finetuning_type": "lora",
        "output_dir": "out",
        "bf16": True,
        **values,
    }
    path = Path("lf.yaml")
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in tree.items()), encoding="utf-8")
    return load_recipe(path)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"quantization_bit": 4}, BitsAndBytesSpec()),
        ({"quantization_bit": 8}, BitsAndBytesSpec(bits=8)),
        (
            {"quantization_bit": 4, "quantization_type": "fp4", "double_quantization": False},
            BitsAndBytesSpec(quant_type="fp4", double=False),
        ),
        ({"quantization_bit": 3, "quantization_method": "hqq"}, HqqSpec(bits=3, axis=0)),
    ],
)
def test_bits_and_method(values: dict[str, Any], expected: Any) -> None:
    assert translated(**values).recipe.model.quantization == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quantization_bit": 3}, "quantization_bit: the number 3: bnb has 4, 8 bits"),
        (
            {"quantization_bit": 8, "quantization_method": "eetq"},
            "quantization_method: EETQ's kernels exist for CUDA",
        ),
        ({"quantization_bit": 8, "quantization_method": "gptq"}, "'gptq' is none of its values"),
        ({"quantization_bit": 4, "quantization_type": "int4"}, "'int4' is none of its values"),
        ({"quantization_device_map": "auto"}, "quantization_device_map: a device map is for generating"),
        ({"quantization_bit": 4, "finetuning_type": "full"}, "rounded weights cannot train"),
        (
            {"quantization_bit": 4, "adapter_name_or_path": "x", "create_new_adapter": True},
            "would round them anew",
        ),
    ],
)
def test_what_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        translated(**values)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("values", "note"),
    [
        ({"quantization_type": "fp4"}, "quantization_type: no effect without quantization_bit"),
        (
            {"quantization_bit": 8, "double_quantization": False},
            "double_quantization: no effect with bnb of 8 bits",
        ),
    ],
)
def test_what_has_no_effect_is_said(values: dict[str, Any], note: str) -> None:
    assert note in translated(**values).notes


def test_a_quantized_reference() -> None:
    recipe = translated(
        stage="dpo", ref_model="r", ref_model_quantization_bit=4, quantization_type="fp4"
    ).recipe
    assert recipe.model.quantization is None
    assert recipe.stage.reference == ReferenceSpec(path="r", quantization=BitsAndBytesSpec(quant_type="fp4"))  # type: ignore[union-attr]
    alone = translated(stage="dpo", ref_model_quantization_bit=4)
    assert any(text.startswith("ref_model_quantization_bit: no effect") for text in alone.notes)
