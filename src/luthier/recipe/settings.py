"""Words like `temperature=0.7` -> settings of an answer, typed and refused as a recipe's `generation:` part is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from luthier.recipe.generation import GenerationSpec
from luthier.recipe.problems import validate_as
from luthier.recipe.source import Document, Place, parse_yaml_value
from luthier.types import RecipeError

_ENGINE = ("engine", "rows", "memory_gib")
"""Of the engine, which is built once, and not of an answer."""

SETTINGS = tuple(name for name in GenerationSpec.model_fields if name not in _ENGINE)
"""The names that a word may have."""


def read_settings(words: Sequence[str]) -> dict[str, Any]:
    """What the words say, by name; null says nothing, so that the next level of precedence holds.

    A name may stand with its section (`generation.top_k=5`). Raises RecipeError, one line for each problem.
    """
    document = Document({}, {}, "settings")
    for word in words:
        key, equals, text = word.partition("=")
        key = key.strip().removeprefix("--").removeprefix("generation.")
        if not equals or not key:
            raise RecipeError(f"{word}: write NAME=VALUE, for example temperature=0.7")
        if key == "engine":
            raise RecipeError(f"{word}: the engine is chosen before the model is loaded: --engine {text}")
        if key in _ENGINE:
            raise RecipeError(f"{word}: {key} is about many answers at once; it has no effect on one")
        value = parse_yaml_value(text, word)
        value = [value] if key == "stop" and isinstance(value, str) else value
        value = [] if key == "stop" and value is None else value
        document.set((key,), value, Place(key, override=word))
    spec = validate_as(GenerationSpec, document)
    return {name: getattr(spec, name) for name in GenerationSpec.model_fields if name in document.tree}
