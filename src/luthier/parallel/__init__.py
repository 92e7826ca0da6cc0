"""Many processes, one model: one module for each strategy of `parallel:`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig

from luthier.parallel.deepspeed import DeepSpeed
from luthier.parallel.fsdp import FullyShard
from luthier.parallel.strategy import Replicated, Strategy
from luthier.parallel.tensor import TensorParallel, require_plan
from luthier.recipe.deepspeed_json import deepspeed_config, offloads
from luthier.recipe.parallel import DdpSpec, DeepSpeedSpec, Fsdp2Spec, TensorSpec
from luthier.recipe.schema import Recipe

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

STRATEGIES: dict[type[Any], Callable[[Recipe, int], Strategy]] = {
    DdpSpec: lambda recipe, processes: Replicated(),
    Fsdp2Spec: lambda recipe, processes: _fsdp2(recipe.parallel, processes),
    DeepSpeedSpec: lambda recipe, processes: _deepspeed(recipe, processes),
    TensorSpec: lambda recipe, processes: _tensor(recipe, recipe.parallel, processes),
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


def _tensor(recipe: Recipe, spec: Any, processes: int) -> Strategy:
    if processes == 1:
        return Replicated()
    return TensorParallel(spec.group or processes, processes, _AUTOCAST.get(recipe.train.precision))


def build_strategy(recipe: Recipe, processes: int, config: PreTrainedConfig) -> Strategy:
    """The strategy of a resolved recipe for so many processes in all, and a model of this config. Raises ModelError as
    `require_divisible` does."""
    require_divisible(recipe, config, processes)
    return STRATEGIES[type(recipe.parallel)](recipe, processes)


def require_divisible(recipe: Recipe, config: PreTrainedConfig, processes: int | None) -> None:
    """Raise ModelError where the strategy cannot divide a model of this config, among `processes` if that is known."""
    spec = recipe.parallel
    if isinstance(spec, TensorSpec) and processes != 1:
        require_plan(config, spec.group or processes)
