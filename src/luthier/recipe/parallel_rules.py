"""What several processes cannot train together; each refusal says why, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from luthier.recipe.parallel import Fsdp2Spec
from luthier.recipe.schema import OnlineSpec, Recipe, SftSpec
from luthier.types import RecipeError

BY_ENTRY = ("adamw", "sgd", "lion", "schedule_free")
"""Optimizers whose update of a number needs nothing but that number, its gradient and its own history."""


def require_parallel(recipe: Recipe, world_size: int) -> None:
    """Raise RecipeError for the first thing that `world_size` processes cannot do with `recipe.parallel`."""
    for text in _refusals(recipe, world_size):
        raise RecipeError(text)


def _refusals(recipe: Recipe, world_size: int) -> Iterator[str]:
    train, name = recipe.train, f"parallel: {recipe.parallel.type}"
    if train.fit_memory and world_size > 1:
        yield (
            f"train.fit_memory works in one process, and these are {world_size}; remove it and give "
            "train.tokens_per_pass"
        )
    if isinstance(recipe.parallel, Fsdp2Spec):
        yield from _fsdp2(recipe, recipe.parallel, world_size)
    if not recipe.parallel.shards:
        return
    if isinstance(recipe.stage, OnlineSpec):
        yield (
            f"{name} does not go with stage: {recipe.stage.type}: answers would gather all weights anew for every "
            "token; use parallel: {type: ddp}"
        )
    if train.generate_at_eval is not None:
        yield (
            f"{name} does not go with train.generate_at_eval: answers would gather all weights anew for every token; "
            "remove it and run `luthier predict` on the result"
        )
    if recipe.model.quantization is not None:
        yield (
            f"{name} does not go with model.quantization: rounded weights are not divided here; use "
            "parallel: {type: ddp}"
        )
    if recipe.optim.in_backward:
        yield (
            f"{name} does not go with optim.type: {recipe.optim.type}, which updates whole parameters in the backward "
            "pass; give another optimizer"
        )


def _fsdp2(recipe: Recipe, spec: Fsdp2Spec, world_size: int) -> Iterator[str]:
    optim, name = recipe.optim, "parallel: fsdp2"
    if world_size == 1:
        for key in ("cpu_offload", "param_dtype", "reduce_dtype"):
            if getattr(spec, key):
                yield f"{name}.{key} needs several processes, and this is one: `luthier train` starts them; remove it"
        return
    if optim.type not in BY_ENTRY or getattr(optim, "bits", 32) == 8 or getattr(optim, "paged", False):
        yield (
            f"{name} divides matrices by rows, and optim.type: {optim.type} as it is set here looks at whole ones (or "
            f"at blocks of 8-bit numbers); choose from {', '.join(BY_ENTRY)} in 32 bits, or parallel: {{type: ddp}}"
        )
    if recipe.method.type == "peft":
        yield (
            f"{name} does not go with method.type: peft: what an adapter of PEFT's does to layers that are gathered "
            "for a moment is proven for lora, oft, vera, ia3 and miss alone; choose one of them, or ddp"
        )
    if isinstance(recipe.stage, SftSpec) and recipe.stage.loss == "asft":
        yield (
            f"{name} does not go with stage.loss: asft, which asks the reference's output head for one piece of the "
            "tokens after the other; use parallel: {type: ddp}"
        )
    if recipe.train.compile is not None:
        yield f"{name} does not go with train.compile: its backward pass fails; remove it"
    if spec.cpu_offload and recipe.train.precision == "fp16":
        yield f"{name}.cpu_offload does not go with train.precision: fp16, whose loss scale needs the device; give bf16"
    if spec.tensor > 1:
        yield f"{name}.tensor: layers are not divided by columns yet; leave it at 1"
