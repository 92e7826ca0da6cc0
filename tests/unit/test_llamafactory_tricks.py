"""Keys of a LLaMA-Factory file about memory and arithmetic: what they become, and what is said of the rest."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.recipe.load import LoadedRecipe, load_recipe
from luthier.recipe.resolve import Hardware, resolve
from luthier.recipe.schema import CheckpointingSpec, FreezeSpec
from luthier.types import RecipeError

GPU = Hardware("cuda", "a GPU", 2**36, True, 8)
OLDER = CheckpointingSpec(reentrant=True)


def load(**values: Any) -> LoadedRecipe:
    return load_recipe({"model_name_or_path": "m", "do_train": True, "dataset": "a", **values})


def said(loaded: LoadedRecipe) -> tuple[str, ...]:
    return tuple(note for note in loaded.notes if note not in load().notes)


@pytest.mark.parametrize(
    ("values", "checkpointing", "offload"),
    [
        ({}, "auto", False),
        ({"disable_gradient_checkpointing": True}, False, False),
        ({"disable_gradient_checkpointing": False}, True, False),
        ({"gradient_checkpointing": True}, True, False),
        ({"use_reentrant_gc": False}, "auto", False),
        ({"use_reentrant_gc": True}, OLDER, False),
        ({"use_reentrant_gc": False, "disable_gradient_checkpointing": False}, True, False),
        ({"use_reentrant_gc": True, "disable_gradient_checkpointing": True}, False, False),
        ({"use_unsloth_gc": True}, "auto", True),
        ({"use_unsloth_gc": True, "use_reentrant_gc": True}, "auto", True),
        ({"use_unsloth_gc": True, "disable_gradient_checkpointing": True}, False, False),
        ({"use_unsloth_gc": True, "disable_gradient_checkpointing": False}, True, True),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            OLDER,
            False,
        ),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
            True,
            False,
        ),
        ({"activation_checkpointing_kwargs": {"use_reentrant": True}}, OLDER, False),
        ({"gradient_checkpointing_kwargs": {}}, "auto", False),
    ],
)
def test_checkpointing(values: dict[str, Any], checkpointing: Any, offload: bool) -> None:
    model = load(**values).recipe.model
    assert (model.gradient_checkpointing, model.activation_offload) == (checkpointing, offload)


def test_what_is_said_of_checkpointing() -> None:
    assert said(load(use_unsloth_gc=True)) == (
        "use_unsloth_gc: the inputs of checkpointed layers wait in host memory; that tool's kernels are not used",
    )
    assert said(load(use_unsloth_gc=True, use_reentrant_gc=False, disable_gradient_checkpointing=True)) == (
        "use_reentrant_gc: no effect with disable_gradient_checkpointing: true",
        "use_unsloth_gc: no effect with disable_gradient_checkpointing: true",
    )
    assert said(load(use_reentrant_gc=True)) == said(load(use_reentrant_gc=False)) == ()
    on_gpu = resolve(load(use_unsloth_gc=True), GPU).recipe.model
    assert (on_gpu.gradient_checkpointing, on_gpu.activation_offload) == (True, True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"use_reentrant": True, "preserve_rng_state": False},
            "preserve_rng_state is not chosen here: what is drawn at random is drawn again; remove it",
        ),
        ({"use_reentrant": 1}, "expected {use_reentrant: true} or {use_reentrant: false}, found a mapping"),
        ("x", "expected {use_reentrant: true} or {use_reentrant: false}, found the text 'x'"),
    ],
)
def test_checkpointing_arguments_that_are_refused(given: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(gradient_checkpointing_kwargs=given)
    assert str(caught.value).startswith(f"gradient_checkpointing_kwargs: {message}")


def test_upcasting_and_pure_bf16() -> None:
    assert load(upcast_layernorm=True).recipe.model.upcast_layernorm
    assert said(load(upcast_lmhead_output=True)) == (
        "upcast_lmhead_output: log-probabilities are always computed from logits in float32, here as there",
    )
    pure = load(pure_bf16=True)
    assert (pure.recipe.model.dtype, pure.recipe.train.precision) == ("bfloat16", "bf16")
    told = "pure_bf16: weights that train are bfloat16; autocast is on here, which keeps such sums as softmax in float32"
    assert told in pure.notes and told not in load(pure_bf16=True, bf16=True).notes


def test_freezing() -> None:
    values = {"finetuning_type": "freeze", "freeze_trainable_layers": 3, "freeze_extra_modules": "norm"}
    method = load(**values, freeze_trainable_modules="mlp").recipe.method
    assert method == FreezeSpec(layers=3, modules=("mlp",), extra_modules=("norm",))


PROJECTOR = "freeze_multi_modal_projector: no effect with lora_target: all, which leaves projectors out there"


@pytest.mark.parametrize(
    ("values", "frozen", "notes"),
    [
        ({"freeze_vision_tower": True, "freeze_multi_modal_projector": True}, None, ()),
        ({"freeze_vision_tower": False}, ("projector",), ()),
        ({"freeze_vision_tower": False, "freeze_language_model": True}, ("projector", "language"), ()),
        ({"freeze_multi_modal_projector": False}, None, (PROJECTOR,)),
        ({"freeze_multi_modal_projector": False, "lora_target": "q_proj,linear_1"}, ("tower",), ()),
        ({"freeze_multi_modal_projector": False, "finetuning_type": "full"}, ("tower",), ()),
    ],
)
def test_parts_of_models_with_images(
    values: dict[str, Any], frozen: tuple[str, ...] | None, notes: tuple[str, ...]
) -> None:
    loaded = load(**values)
    assert loaded.recipe.model.frozen_parts == frozen
    if "finetuning_type" not in values:
        assert said(loaded) == notes
