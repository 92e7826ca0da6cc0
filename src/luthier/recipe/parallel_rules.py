"""What several processes cannot train together; each refusal says why, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from luthier.recipe.deepspeed_json import zero_stage
from luthier.recipe.parallel import DeepSpeedSpec, Fsdp2Spec, TensorSpec
from luthier.recipe.reference import is_precomputed
from luthier.recipe.schema import AdamwSpec, LionSpec, LoraSpec, OnlineSpec, Recipe, SftSpec, SgdSpec
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
    if isinstance(recipe.parallel, TensorSpec):
        yield from _tensor(recipe, recipe.parallel, world_size)
    if recipe.optim.in_backward and world_size > 1:
        yield (
            f"optim.type: {recipe.optim.type} updates parameters in the backward pass, before the gradients of "
            f"{world_size} processes are added up; remove layerwise, or give another optimizer"
        )
    if recipe.optim.type == "badam" and world_size > 1:
        yield (
            f"optim.type: badam changes which parameters train, and {world_size} processes agree on that when they "
            "begin; use badam_ratio"
        )
    if not recipe.parallel.shards:
        return
    why = "answers would gather all weights anew for every token"
    if isinstance(recipe.parallel, TensorSpec):
        why = "answers are made by processes that hold the whole model"
    if isinstance(recipe.stage, OnlineSpec):
        yield f"{name} does not go with stage: {recipe.stage.type}: {why}; use parallel: {{type: ddp}}"
    if train.generate_at_eval is not None:
        yield (
            f"{name} does not go with train.generate_at_eval: {why}; remove it and run `luthier predict` on the result"
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
    if isinstance(recipe.parallel, DeepSpeedSpec) and zero_stage(recipe, world_size):
        yield from _not_with_zero(recipe)


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


def _not_with_zero(recipe: Recipe) -> Iterator[str]:
    """What DeepSpeed's own step leaves no room for."""
    train, optim, name = recipe.train, recipe.optim, "parallel: deepspeed"
    if train.precision == "fp16":
        yield (
            f"{name} does not go with train.precision: fp16 here, whose loss scale it keeps to itself; give bf16 or "
            "fp32"
        )
    if (action := train.bad_numbers.action) != "stop":
        yield (
            f"{name} does not go with train.bad_numbers.action: {action}: gradients that it has taken in cannot be "
            "given back; give stop, or use parallel: {type: ddp}"
        )
    if train.compile is not None:
        yield f"{name} does not go with train.compile: it works by hooks of its own; remove it"
    if train.fit_memory:
        yield (
            f"{name} does not go with train.fit_memory: a pass that did not fit leaves gradients behind; remove it and "
            "give train.tokens_per_pass"
        )
    small = isinstance(optim, AdamwSpec | LionSpec) and (optim.bits != 32 or optim.paged)
    if small or not isinstance(optim, AdamwSpec | LionSpec | SgdSpec):
        kind = f"{optim.type}{' with bits or paged' if small else ''}"
        yield (
            f"{name} does not go with optim.type: {kind}: a process holds pieces of flat rows of numbers, in which "
            "there are no matrices, layers or blocks; give adamw, sgd or lion with 32 bits"
        )


def _tensor(recipe: Recipe, spec: TensorSpec, world_size: int) -> Iterator[str]:
    optim, train, method, name = recipe.optim, recipe.train, recipe.method, "parallel: tensor"
    if world_size > 1 and spec.group is not None and world_size % spec.group:
        yield (
            f"{name}.group: {world_size} processes are not groups of {spec.group}; give parallel.processes that "
            f"{spec.group} divides"
        )
    if optim.type not in BY_ENTRY or getattr(optim, "bits", 32) == 8 or getattr(optim, "paged", False):
        yield (
            f"{name} divides matrices, and optim.type: {optim.type} as it is set here looks at whole ones (or at "
            f"blocks of 8-bit numbers); choose from {', '.join(BY_ENTRY)} in 32 bits, or parallel: {{type: ddp}}"
        )
    if method.type not in ("full", "freeze", "llama_pro", "lora"):
        yield f"{name} does not go with method.type: {method.type}: of adapters, LoRA's alone are divided; use lora"
    if isinstance(method, LoraSpec):
        if method.dropout:
            yield (
                f"{name} does not go with method.dropout: each process would draw it for its own part of a layer's "
                "inputs; write 0"
            )
        if method.dora or method.target_parameters:
            key = "dora" if method.dora else "target_parameters"
            yield f"{name} does not go with method.{key}, which looks at whole matrices; remove it"
    if train.precision == "fp16":
        yield f"{name} does not go with train.precision: fp16: each process would scale the loss by itself; give bf16"
    if train.compile is not None:
        yield f"{name} does not go with train.compile: compiled layers that are divided are not proven; remove it"
    if recipe.model.activation_offload:
        yield f"{name} does not go with model.activation_offload, which is not proven for divided layers; remove it"
    if (
        spec.group is not None
        and world_size > spec.group
        and is_precomputed(getattr(recipe.stage, "reference", "start"))
    ):
        yield (
            f"{name}.group: {spec.group} with stage.reference: precompute: a group could find answers that another has "
            "written while its own processes still look for them; write reference: start"
        )
