"""Many processes, one model: one module for each strategy of `parallel:`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from luthier.parallel.strategy import Replicated, Strategy
from luthier.recipe.parallel import DdpSpec
from luthier.recipe.schema import Recipe

STRATEGIES: dict[type[Any], Callable[[Recipe, int], Strategy]] = {
    DdpSpec: lambda recipe, processes: Replicated()
}


def build_strategy(recipe: Recipe, processes: int) -> Strategy:
    """The strategy of a resolved recipe for so many processes in all."""
    return STRATEGIES[type(recipe.parallel)](recipe, processes)
