"""Resolving: what a machine decides, what nobody said, and what stays as it was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from luthier.recipe.load import LoadedRecipe, dump_recipe, load_recipe
from luthier.recipe.resolve import TOKENS_PER_BATCH, TOKENS_PER_PASS, Hardware, resolve
from luthier.recipe.schema import LoraSpec, Recipe
from luthier.types import RecipeError

GIB = 2**30
CPU = Hardware("cpu", "a processor", 8 * GIB, True, 2)
H200 = Hardware("cuda", "NVIDIA H200", 140 * GIB, True, 16, world_size=8)
T4 = Hardware("cuda", "Tesla T4", 16 * GIB, False, 8)
MAC = Hardware("mps", "Apple arm64", 16 * GIB, False, 8)


def loaded(**sections: Any) -> LoadedRecipe:
    tree: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": ["a"]}}
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return load_recipe(tree)


@pytest.mark.parametrize(
    ("hardware", "method", "precision", "dtype", "attention", "tokens"),
    [
        (CPU, "lora", "fp32", "float32", "sdpa", 512),
        (CPU, "full", "fp32", "float32", "sdpa", 512),
        (H200, "lora", "bf16", "bfloat16", "varlen", 8192),
        (H200, "full", "bf16", "float32", "varlen", 8192),
        (H200, "freeze", "bf16", "float32", "varlen", 8192),
        (T4, "lora", "fp32", "float32", "sdpa", 8192),
        (MAC, "lora", "fp32", "float32", "sdpa", 2048),
    ],
)
def test_what_the_machine_decides(
    hardware: Hardware, method: str, precision: str, dtype: str, attention: str, tokens: int
) -> None:
    result = resolve(loaded(method={"type": method}), hardware)
    recipe = result.recipe
    assert recipe.train.precision == precision
    assert (recipe.model.dtype, recipe.model.attention) == (dtype, attention)
    assert recipe.train.tokens_per_pass == tokens == TOKENS_PER_PASS[hardware.device]
    for key in ("train.precision", "model.dtype", "model.attention", "train.tokens_per_pass"):
        assert result.origins[key] == "hardware"


def test_fp16_is_kept_to_the_older_gpus_kernels() -> None:
    recipe = resolve(loaded(train={"precision": "fp16"}), T4).recipe
    assert (recipe.train.precision, recipe.model.dtype, recipe.model.attention) == ("fp16", "float16", "sdpa")


def test_full_precision_on_a_gpu_has_no_variable_length_kernel() -> None:
    recipe = resolve(loaded(train={"precision": "fp32"}), H200).recipe
    assert (recipe.model.dtype, recipe.model.attention) == ("float32", "sdpa")


def test_what_was_written_is_kept_with_its_origin() -> None:
    before = loaded(
        model={"dtype": "float16", "attention": "sdpa"},
        data={"overflow": "error"},
        method={"alpha": 3},
        train={"precision": "bf16", "tokens_per_pass": 7, "tokens_per_batch": 9, "data_seed": 5},
    )
    after = resolve(before, CPU)
    changed = {"train": {"best_metric": "eval_loss", "greater_is_better": False, "eval_precision": "bf16"}}
    assert after.recipe.model_dump() == {
        **before.recipe.model_dump(),
        "train": {**before.recipe.model_dump()["train"], **changed["train"]},
    }
    assert after.origins["model.dtype"] == "given"
    assert after.origins["data.overflow"] == "given"


def test_what_nobody_said_is_a_default() -> None:
    result = resolve(loaded(train={"seed": 7}), CPU)
    train = result.recipe.train
    assert (train.tokens_per_batch, train.data_seed, train.greater_is_better) == (TOKENS_PER_BATCH, 7, False)
    assert TOKENS_PER_BATCH == 4096
    assert result.recipe.data.overflow == "drop"
    assert resolve(loaded(stage={"type": "pt"}), CPU).recipe.data.overflow == "split"
    assert isinstance(result.recipe.method, LoraSpec)
    assert result.recipe.method.alpha == 16.0
    for key in ("train.tokens_per_batch", "data.overflow", "method.alpha", "train.data_seed"):
        assert result.origins[key] == "default"


def test_rows_keep_their_own_rule() -> None:
    train = resolve(loaded(train={"rows_per_device": 2, "accumulation": 4}), CPU).recipe.train
    assert (train.tokens_per_batch, train.rows_per_device, train.accumulation) == (None, 2, 4)


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("eval_loss", False),
        ("eval_perplexity", False),
        ("eval_accuracy", True),
        ("eval_nll_loss", False),
        ("eval_loss/ipo", False),
        ("eval_rewards/accuracies", True),
        ("eval_rewards/margins", True),
        ("eval_rewards/chosen", True),
        ("eval_rewards/rejected", False),
        ("eval_logps/rejected", False),
        ("rewards/accuracies", True),
    ],
)
def test_direction_of_the_metric(metric: str, greater: bool) -> None:
    assert resolve(loaded(train={"best_metric": metric}), CPU).recipe.train.greater_is_better is greater
    said = loaded(train={"best_metric": metric, "greater_is_better": not greater})
    assert resolve(said, CPU).recipe.train.greater_is_better is not greater


@pytest.mark.parametrize(("hardware", "on"), [(CPU, False), (H200, True), (MAC, True)])
def test_automatic_checkpointing_is_for_gpus(hardware: Hardware, on: bool) -> None:
    automatic = resolve(loaded(model={"gradient_checkpointing": "auto"}), hardware)
    assert automatic.recipe.model.gradient_checkpointing is on
    assert automatic.origins["model.gradient_checkpointing"] == "hardware"
    assert resolve(loaded(), hardware).recipe.model.gradient_checkpointing is False


def test_no_more_workers_than_cores() -> None:
    many = resolve(loaded(data={"workers": 16}), CPU)
    assert (many.recipe.data.workers, many.origins["data.workers"]) == (2, "hardware")
    assert resolve(loaded(data={"workers": 16}), H200).recipe.data.workers == 16
    assert resolve(loaded(), CPU).origins["data.workers"] == "default"


def _open(recipe: Recipe) -> list[str]:
    return [
        f"{section}.{name}"
        for section, values in recipe.model_dump().items()
        for name, value in values.items()
        if value == "auto"
        and section != "export"  # decided by the files that it reads, when it runs
        and (section, name) not in {("train", "resume"), ("train", "async_save"), ("model", "rows")}
    ]


@pytest.mark.parametrize("hardware", [CPU, H200, T4, MAC])
def test_nothing_is_left_open_and_resolving_again_changes_nothing(hardware: Hardware) -> None:
    before = loaded(model={"gradient_checkpointing": "auto"})
    # How many processes there are is the launcher's to say, which counts the GPUs of each machine.
    by_launcher = ["parallel.processes"]
    assert len(_open(before.recipe)) == 5 + len(by_launcher)
    once = resolve(before, hardware)
    assert _open(once.recipe) == by_launcher
    assert resolve(once, hardware) == once
    assert resolve(once, CPU).recipe == once.recipe
    assert before == loaded(model={"gradient_checkpointing": "auto"})


def test_the_resolved_recipe_survives_its_file(tmp_path: Path) -> None:
    result = resolve(loaded(train={"output": "runs/x"}), H200)
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(result))
    assert load_recipe(file).recipe == result.recipe
    assert "  dtype: bfloat16  # hardware\n" in file.read_text()


def test_arithmetic_that_the_machine_lacks() -> None:
    with pytest.raises(RecipeError) as caught:
        resolve(loaded(train={"precision": "bf16"}), T4)
    assert str(caught.value) == (
        "train.precision=bf16: Tesla T4 does not compute bfloat16; use auto, fp32 or fp16"
    )
    with pytest.raises(RecipeError) as caught:
        resolve(loaded(train={"eval_precision": "fp16"}), MAC)
    assert str(caught.value) == (
        "train.eval_precision=fp16: loss scaling is for CUDA GPUs and CPUs, and this is Apple arm64; use auto"
    )


@pytest.mark.parametrize("hardware", [CPU, T4, MAC], ids=lambda hardware: hardware.name)
def test_tensorfloat32_is_for_gpus_that_have_it(hardware: Hardware) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve(loaded(train={"tf32": True}), hardware)
    assert str(caught.value) == (
        "train.tf32=true: TensorFloat-32 is arithmetic of NVIDIA GPUs from Ampere (2020) on, and this is "
        f"{hardware.name}; remove it"
    )
    assert resolve(loaded(train={"tf32": False}), hardware).recipe.train.tf32 is False
    assert resolve(loaded(train={"tf32": True}), H200).recipe.train.tf32 is True


def test_memory_is_fitted_in_one_process() -> None:
    with pytest.raises(RecipeError, match=r"^train\.fit_memory works in one process, and these are 8"):
        resolve(loaded(train={"fit_memory": True}), H200)
    assert resolve(loaded(train={"fit_memory": True}), T4).recipe.train.fit_memory is True


def test_evaluations_have_their_own_precision() -> None:
    recipe = resolve(loaded(train={"precision": "bf16"}), H200).recipe
    assert recipe.train.eval_precision == "bf16"
    recipe = resolve(loaded(train={"precision": "bf16", "eval_precision": "fp32"}), H200).recipe
    assert (recipe.train.precision, recipe.train.eval_precision) == ("bf16", "fp32")
    recipe = resolve(loaded(train={"precision": "fp16"}), CPU).recipe
    assert (recipe.train.eval_precision, recipe.model.dtype) == ("fp16", "float32")
