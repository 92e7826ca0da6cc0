"""What part of the model a parameter is, for the optimizers that treat parts differently."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from luthier.model.critic import critic_of
from luthier.model.value_head import value_head

Role = Literal["embedding", "head", "score", "matrix", "other"]
_IN_LAYER = re.compile(r"(?:^|.*?\.)(\d+)\.")
"""A name up to its first number: that of a layer in a list of layers."""


@dataclass(frozen=True, slots=True)
class Place:
    """role: of embeddings, output head, the head of a reward model or critic, a two-dimensional weight elsewhere,
    anything else. layer: the layer's name up to its number, None outside layers."""

    name: str
    role: Role
    layer: str | None


def places(model: nn.Module) -> dict[int, Place]:
    """The place of every parameter, by its `id`. A tied one has the place of its first name."""
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    inputs, outputs = (_part(model, f"get_{side}_embeddings") for side in ("input", "output"))
    parts: list[tuple[Role, list[nn.Module]]] = [
        ("embedding", embeddings + inputs),
        ("head", outputs),
        ("score", [head] if (head := value_head(model)) is not None else []),
        ("score", [critic.head] if (critic := critic_of(model)) is not None else []),
    ]
    roles: dict[int, Role] = {}
    for role, modules in parts:
        for module in modules:
            for parameter in module.parameters():
                roles.setdefault(id(parameter), role)
    found = {}
    for name, parameter in model.named_parameters():
        layer = _IN_LAYER.match(name)
        plain: Role = "matrix" if parameter.ndim == 2 else "other"
        place = Place(name, roles.get(id(parameter), plain), layer[0] if layer else None)
        found[id(parameter)] = place
    return found


def _part(model: Any, getter: str) -> list[nn.Module]:
    part = getattr(model, getter, lambda: None)()
    return [part] if isinstance(part, nn.Module) else []


def is_target(place: Place, targets: str | list[str]) -> bool:
    """Whether `targets` of a low-rank optimizer names the parameter's module."""
    if place.role != "matrix":
        return False
    module = place.name.rpartition(".")[0]
    return targets == "all-linear" or any(target in module for target in targets)
