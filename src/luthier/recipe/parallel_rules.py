"""What several processes cannot train together; each refusal says why, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from luthier.recipe.schema import OnlineSpec, Recipe
from luthier.types import RecipeError


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
