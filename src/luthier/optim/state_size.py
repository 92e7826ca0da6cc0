"""What an optimizer will keep between steps, in bytes, before it is built."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from luthier.optim.adam_mini import ENTRY, TENSOR, adam_mini_blocks
from luthier.optim.badam import layer_blocks, trains_in_ratio
from luthier.optim.projection import sides
from luthier.optim.roles import Place, is_target, places
from luthier.recipe.schema import (
    AdamwSpec,
    BadamRatioSpec,
    BadamSpec,
    GaloreSpec,
    LionSpec,
    LowRankSpec,
    OptimSpec,
    SgdSpec,
)

FLOAT = 4
_QUANTIZED_FROM = 4096
"""bitsandbytes keeps smaller tensors' states in float32."""
_BLOCK, _CODES = 256, 256
"""Numbers that share a scale there, and entries of the table that says what the 8-bit codes mean."""


def _copies(parameter: Tensor, number: int) -> int:
    return number * parameter.numel() * parameter.element_size()


def _torch_adamw(parameter: Tensor) -> int:
    return _copies(parameter, 2) + FLOAT  # two moments, and a float32 count of steps


def _quantized(parameter: Tensor, moments: int, bits: int) -> int:
    if bits == 32 or parameter.numel() < _QUANTIZED_FROM:
        return moments * FLOAT * parameter.numel()
    return moments * (parameter.numel() + FLOAT * math.ceil(parameter.numel() / _BLOCK))


def _adamw(spec: AdamwSpec, parameter: Tensor, place: Place) -> int:
    plain = spec.bits == 32 and not spec.paged
    if plain or (spec.bits == 8 and place.role == "embedding"):
        return _torch_adamw(parameter)
    return _quantized(parameter, 2, spec.bits)


def _sgd(spec: SgdSpec, parameter: Tensor, place: Place) -> int:
    return _copies(parameter, 1 if spec.momentum else 0)


def _lion(spec: LionSpec, parameter: Tensor, place: Place) -> int:
    plain = spec.bits == 32 and not spec.paged
    if plain or (spec.bits == 8 and place.role == "embedding"):
        return _copies(parameter, 1)
    return _quantized(parameter, 1, spec.bits)


def _factored(parameter: Tensor) -> int:
    if parameter.ndim < 2:
        return FLOAT * parameter.numel()
    return FLOAT * (parameter.numel() // parameter.shape[-1] + parameter.numel() // parameter.shape[-2])


def _muon(spec: OptimSpec, parameter: Tensor, place: Place) -> int:
    return _copies(parameter, 1) if place.role == "matrix" else _torch_adamw(parameter)


def _low_rank(spec: LowRankSpec, parameter: Tensor, place: Place) -> int:
    if not is_target(place, spec.targets):
        return _copies(parameter, 2)
    rows, columns = parameter.shape
    wanted = sides(spec.side, rows, columns)  # type: ignore[attr-defined]
    random = getattr(spec, "projection", "svd") == "random"
    rank = spec.rank if random else min(spec.rank, rows, columns)
    low = (rank if "left" in wanted else rows) * (rank if "right" in wanted else columns)
    bases = 0 if random else rank * (("left" in wanted) * rows + ("right" in wanted) * columns)
    norm = 0 if isinstance(spec, GaloreSpec) else 1
    return (2 * low + bases + norm) * parameter.element_size()


def _ratio(spec: BadamRatioSpec, parameter: Tensor, place: Place) -> int:
    included = {"include_embedding": spec.include_embedding, "include_head": spec.include_head}
    if not trains_in_ratio(place, **included):
        return 0
    count = max(1, int(parameter.numel() * spec.ratio))
    return count * (2 * parameter.element_size() + (8 if spec.mask == "scatter" else 0))


BY_PARAMETER: dict[str, Callable[[Any, Tensor, Place], int]] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "lion": _lion,
    # beside its factors it keeps the parameter's root mean square
    "adafactor": lambda spec, parameter, place: _factored(parameter) + FLOAT,
    "muon": _muon,
    "schedule_free": lambda spec, parameter, place: _copies(parameter, 2),
    "galore": _low_rank,
    "apollo": _low_rank,
    "badam_ratio": _ratio,
    "lomo": lambda spec, parameter, place: 0,
    "adalomo": lambda spec, parameter, place: _factored(parameter),
}
"""Bytes of the states of one parameter, for optimizers that look at each by itself."""


def state_bytes(spec: OptimSpec, model: nn.Module) -> int:
    """What the optimizer keeps between steps for the parameters of `model` that train."""
    trained: list[Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if isinstance(spec, BadamSpec):
        return max(sum(_block_adam(parameter) for parameter in block) for block in _blocks(spec, model))
    if spec.type == "adam_mini":  # type: ignore[attr-defined]
        blocks = adam_mini_blocks(model)
        return sum(_adam_mini(parameter, blocks[id(parameter)]) for parameter in trained)
    found = places(model)
    size = BY_PARAMETER[spec.type]  # type: ignore[attr-defined]
    return _code_tables(spec, trained, found) + sum(
        size(spec, parameter, found[id(parameter)]) for parameter in trained
    )


def _code_tables(spec: OptimSpec, trained: list[Tensor], found: dict[int, Place]) -> int:
    """What the 8-bit codes of each moment mean, once for all tensors that have them."""
    if getattr(spec, "bits", 32) == 32:
        return 0
    moments = 2 if isinstance(spec, AdamwSpec) else 1
    coded = any(
        parameter.numel() >= _QUANTIZED_FROM and found[id(parameter)].role != "embedding"
        for parameter in trained
    )
    return FLOAT * _CODES * moments * coded


def gradients_at_once(spec: OptimSpec, model: nn.Module) -> list[Tensor]:
    """The parameters whose gradients are there at the same time: those that train, those of BAdam's largest block, or
    the largest one where each is updated in backward."""
    trained: list[Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if isinstance(spec, BadamSpec):
        return max(_blocks(spec, model), key=lambda block: sum(_copies(parameter, 1) for parameter in block))
    if spec.in_backward and trained:
        return [max(trained, key=lambda parameter: _copies(parameter, 1))]
    return trained


def _blocks(spec: BadamSpec, model: nn.Module) -> list[list[Tensor]]:
    """BAdam's blocks, each with what always trains."""
    trained: list[Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    blocks, always = layer_blocks(
        model,
        [{"params": trained}],
        include_embedding=spec.include_embedding,
        include_head=spec.include_head,
    )
    return [block + always for block in blocks]


def _block_adam(parameter: Tensor) -> int:
    copies = 2 if parameter.element_size() == FLOAT else 3  # with a float32 copy of the parameter
    return copies * FLOAT * parameter.numel()


def _adam_mini(parameter: Tensor, block: int) -> int:
    entries = parameter.numel()
    second = entries if block == ENTRY else 1 if block == TENSOR else entries // block
    return (entries + second) * parameter.element_size()
