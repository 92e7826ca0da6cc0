"""Parameter groups: those of the method, cut by the patterns of the recipe. Every optimizer starts from them."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from luthier.optim.parameterwise import Groups
from luthier.recipe.schema import OptimSpec
from luthier.types import RecipeError


def cut_groups(spec: OptimSpec, groups: Groups, model: nn.Module) -> Groups:
    """The method's groups, each cut where entries of `optim.groups` match its parameters; the first match wins.

    A group keeps whatever the method gave it; one that names no `lr` gets the recipe's. What no entry matches comes
    first. A tied parameter is known by all of its names. Raises RecipeError for an entry that decides nothing.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    rules = [re.compile(entry.match) for entry in spec.groups]
    plain: Groups = []
    cut: list[Groups] = [[] for _ in rules]
    matched = [False] * len(rules)
    for group in groups:
        group = {"lr": spec.lr, **group}
        parts: dict[int | None, list[Any]] = {}
        for parameter in group["params"]:
            hits = [any(rule.search(name) for name in names.get(id(parameter), ())) for rule in rules]
            matched = [before or hit for before, hit in zip(matched, hits, strict=True)]
            parts.setdefault(hits.index(True) if any(hits) else None, []).append(parameter)
        for index, parameters in parts.items():
            part = {**group, "params": parameters}
            (plain if index is None else cut[index]).append(
                part if index is None else _ruled(part, spec, index)
            )
    for index, parts_of in enumerate(cut):
        if not parts_of:
            _refuse(spec, index, matched[index])
    return [*plain, *(group for groups_of in cut for group in groups_of)]


def _ruled(group: dict[str, Any], spec: OptimSpec, index: int) -> dict[str, Any]:
    rule, changed = spec.groups[index], dict(group)
    if rule.lr is not None:
        changed["lr"] = rule.lr
    if rule.lr_scale is not None:
        changed["lr"] = group["lr"] * rule.lr_scale
    if rule.weight_decay is not None:
        changed["weight_decay"] = rule.weight_decay
    return changed


def _refuse(spec: OptimSpec, index: int, matched: bool) -> None:
    why = (
        "earlier entries match all that it matches"
        if matched
        else "no parameter that trains has such a name (`luthier check` lists what trains)"
    )
    raise RecipeError(f"optim.groups[{index}].match={spec.groups[index].match!r}: {why}")
