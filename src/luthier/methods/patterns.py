"""Parameters by patterns over their full names."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from luthier.recipe.problems import nearest
from luthier.types import ModelError


def matched(model: nn.Module, patterns: Sequence[str], key: str) -> dict[nn.Parameter, list[str]]:
    """The parameters in whose full name one of the patterns is found, each with all of its names.

    A matrix that is embeddings and head has the names of both, and is found by either. Raises ModelError, which names
    `key`, for a pattern that is found nowhere.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    found: set[nn.Parameter] = set()
    for pattern in patterns:
        hits = {one for one, called in names.items() if any(re.search(pattern, name) for name in called)}
        if not hits:
            raise ModelError(_nowhere(pattern, key, [name for called in names.values() for name in called]))
        found |= hits
    return {parameter: called for parameter, called in names.items() if parameter in found}


def _nowhere(pattern: str, key: str, names: list[str]) -> str:
    parts = sorted({part for name in names for part in name.split(".")})
    words = [word for word in re.findall(r"[A-Za-z]\w+", pattern) if word not in parts]
    close = [near for near in (nearest(word, parts) for word in words) if near is not None]
    hint = f"did you mean {close[0]}? Names" if close else "names"
    return f"{key}: {pattern!r} is found in no parameter's name; {hint} are like {names[0]} and {names[-1]}"
