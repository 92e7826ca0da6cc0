"""The methods of a LLaMA-Factory file beside plain LoRA, freeze and full."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from luthier.recipe.load import dump_recipe, load_recipe
from luthier.recipe.schema import FreezeSpec, FullSpec, LlamaProSpec, LoraSpec, OftSpec
from luthier.types import RecipeError

BASE: dict[str, Any] = {"model_name_or_path": "m", "do_train": True, "dataset": "a", "bf16": True}
CONVERTED = (
    "pissa_init: the base is not changed here, and what is saved is a plain LoRA of twice the rank for it, as with "
    "pissa_convert: true"
)
EXPANDED = (
    "use_llama_pro: the model was expanded before, as there; method.expand: true in a recipe expands it"
)


@pytest.mark.parametrize(
    ("values", "method", "notes"),
    [
        ({"use_rslora": True}, LoraSpec(rslora=True), []),
        ({"use_dora": True}, LoraSpec(dora=True), []),
        ({"pissa_init": True}, LoraSpec(init="pissa", init_iterations=16), [CONVERTED]),
        ({"pissa_init": True, "pissa_iter": -1}, LoraSpec(init="pissa"), [CONVERTED]),
        (
            {"pissa_init": True, "pissa_iter": 4, "pissa_convert": True},
            LoraSpec(init="pissa", init_iterations=4),
            [CONVERTED],
        ),
        ({"loraplus_lr_ratio": 16}, LoraSpec(lora_plus_ratio=16.0, lora_plus_embedding_lr=1e-6), []),
        (
            {"loraplus_lr_ratio": 4.0, "loraplus_lr_embedding": 1e-5},
            LoraSpec(lora_plus_ratio=4.0, lora_plus_embedding_lr=1e-5),
            [],
        ),
        (
            {"pissa_iter": 4, "loraplus_lr_embedding": 1e-5},
            LoraSpec(),
            [
                "pissa_iter: no effect without pissa_init",
                "loraplus_lr_embedding: no effect without loraplus_lr_ratio",
            ],
        ),
        (
            {"use_dora": True, "adapter_name_or_path": "x"},
            LoraSpec(adapters=("x",)),
            ["use_dora: no effect on an adapter that is continued, as there"],
        ),
        (
            {"use_dora": True, "adapter_name_or_path": "x", "create_new_adapter": True},
            LoraSpec(adapters=("x",), create_new_adapter=True, dora=True),
            [],
        ),
        ({"finetuning_type": "oft"}, OftSpec(), []),
        (
            {"finetuning_type": "oft", "oft_block_size": 64, "module_dropout": 0.1, "lora_target": "q_proj"},
            OftSpec(block_size=64, dropout=0.1, targets=("q_proj",)),
            [],
        ),
        ({"finetuning_type": "oft", "oft_rank": 8}, OftSpec(blocks=8, block_size=0), []),
        (
            {"finetuning_type": "oft", "oft_target": "v_proj", "additional_target": "lm_head"},
            OftSpec(targets=("v_proj",), modules_to_save=("lm_head",)),
            ["oft_target: OFT goes on the layers that it names; there it goes on those of lora_target"],
        ),
        (
            {"finetuning_type": "freeze", "use_llama_pro": True, "freeze_trainable_layers": 8},
            LlamaProSpec(blocks=8, expand=False),
            [EXPANDED],
        ),
        (
            {
                "finetuning_type": "freeze",
                "use_llama_pro": True,
                "freeze_trainable_modules": "mlp",
                "freeze_extra_modules": "norm",
            },
            LlamaProSpec(expand=False, modules=("mlp",), extra_modules=("norm",)),
            [EXPANDED],
        ),
        (
            {"finetuning_type": "full", "pissa_init": True, "oft_rank": 8, "loraplus_lr_ratio": 2.0},
            FullSpec(),
            [
                "loraplus_lr_ratio: no effect with finetuning_type: full",
                "oft_rank: no effect with finetuning_type: full",
                "pissa_init: no effect with finetuning_type: full",
            ],
        ),
        (
            {"finetuning_type": "freeze", "oft_target": "q_proj"},
            FreezeSpec(),
            ["oft_target: no effect with finetuning_type: freeze"],
        ),
    ],
)
def test_a_method_translates(values: dict[str, Any], method: Any, notes: list[str]) -> None:
    loaded = load_recipe(BASE | values)
    assert loaded.recipe.method == method
    assert [note for note in loaded.notes if "train.precision" not in note] == notes
    assert load_recipe(yaml.safe_load(dump_recipe(loaded))).recipe.method == method


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_llama_pro": True}, "use_llama_pro: goes with finetuning_type: freeze"),
        (
            {"use_llama_pro": True, "finetuning_type": "full"},
            "use_llama_pro: goes with finetuning_type: freeze",
        ),
        ({"use_dora": 1}, "use_dora: expected true or false, found the number 1"),
        ({"pissa_init": True, "use_dora": True}, "both take the weight apart"),
        (
            {"finetuning_type": "oft", "oft_rank": 8, "oft_block_size": 16},
            "one of block_size and blocks says how large a block is",
        ),
        (
            {"finetuning_type": "full", "adapter_name_or_path": "x"},
            "an adapter goes with finetuning_type: lora",
        ),
    ],
)
def test_what_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(BASE | values)
