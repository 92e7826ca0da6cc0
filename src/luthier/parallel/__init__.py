"""Many processes, one model: one module for each strategy of `parallel:`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from luthier.parallel.deepspeed import DeepSpeed
from luthier.parallel.fsdp import FullyShard
from luthier.parallel.strategy import Replicated, Strategy
from luthier.recipe.deepspeed_json import deepspeed_config, offloads
from luthier.recipe.parallel import DdpSpec, DeepSpeedSpec, Fsdp2Spec
from luthier.recipe.schema import Recipe

STRATEGIES: dict[type[Any], Callable[[Recipe, int], Strategy]] = {
    DdpSpec: lambda recipe, processes: Replicated(),
    Fsdp2Spec: lambda recipe, processes: _fsdp2(recipe.parallel, processes),
    DeepSpeedSpec: lambda recipe, processes: _deepspeed(recipe, processes),
}


def _fsdp2(spec: Any, processes: int) -> Strategy:
    """One process has nothing to divide with, and computes what many do."""
    return FullyShard(spec) if processes > 1 else Replicated()


def _deepspeed(recipe: Recipe, processes: int) -> Strategy:
    """ZeRO 0 divides nothing, and one process has nobody to divide with: it is there for the host's memory."""
    config = deepspeed_config(recipe)
    if config["zero_optimization"]["stage"] and (processes > 1 or offloads(config)):
        return DeepSpeed(config, processes)
    return Replicated()


def build_strategy(recipe: Recipe, processes: int) -> Strategy:
    """The strategy of a resolved recipe for so many processes in all."""
    return STRATEGIES[type(recipe.parallel)](recipe, processes)
