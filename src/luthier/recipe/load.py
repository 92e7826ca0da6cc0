"""From a file, a mapping and the command line to a typed recipe that knows where each value came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.recipe import llamafactory
from luthier.recipe.foreign import refuse_foreign
from luthier.recipe.problems import annotation_at, members, specs, tag, validate
from luthier.recipe.schema import Recipe, Spec
from luthier.recipe.source import (
    Document,
    KeyPath,
    Place,
    dotted,
    dump_value,
    from_mapping,
    parse_yaml_value,
    read_file,
)
from luthier.types import RecipeError

DEFAULT = "default"
"""The origin of a value that nobody gave."""


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe and the story of its values.

    `origins` maps every dotted key to `default`, `FILE:LINE`, `command line`, `translated from KEY (line N)`,
    `hardware`, or, for a recipe that was a Python mapping, `given`.
    """

    recipe: Recipe
    origins: Mapping[str, str]
    path: Path | None = None
    notes: tuple[str, ...] = ()
    """What the user should know: meanings that a translation narrowed, folders found elsewhere."""
    llamafactory: bool = False
    """Whether the file was a LLaMA-Factory one."""
    secrets: frozenset[str] = field(default=frozenset({"model.token"}), repr=False)
    """Keys whose values are never printed or written."""


def load_recipe(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), *, to_export: bool = False
) -> LoadedRecipe:
    """Read, translate, override and validate.

    source: path of a native or LLaMA-Factory file (YAML or JSON), or the same as a mapping.
    overrides: words like `train.epochs=2`; for a LLaMA-Factory file also its own keys (`learning_rate=1e-5`).
    to_export: it may have nothing to train on: an export alone, or a model that only answers.
    Raises RecipeError: one line for each problem, naming file, line and key, or the override.
    """
    document = from_mapping(source) if isinstance(source, Mapping) else read_file(Path(source))
    refuse_foreign(document.tree, document.label)
    flat = llamafactory.recognises(document.tree)
    nested = [_split(word) for word in overrides]
    if flat:
        for key, value, word in [item for item in nested if "." not in item[0]]:
            document.set((key,), value, Place(key, override=word))
        document = llamafactory.translate(document, to_export=to_export)
        nested = [item for item in nested if "." in item[0]]
    for key, value, word in nested:
        _override(document, key, value, word)
    _fill_sections(document)
    if document.path is not None:
        _default_output(document, document.path)
    recipe = validate(document)
    if not (to_export or recipe.train.eval_only or recipe.data.train):
        where = f"{document.label}: " if document.label else ""
        raise RecipeError(f"{where}data.train is empty: this recipe only {_verb(recipe)} with it")
    recipe = _find_directory(recipe, document)
    return LoadedRecipe(recipe, _origins(recipe, document), document.path, tuple(document.notes), flat)


def _verb(recipe: Recipe) -> str:
    if recipe.export.output is not None:
        return "exports; run `luthier export`"
    return "predicts; run `luthier predict`" if recipe.data.eval else "answers; run `luthier chat`"


# --------------------------------------------------------------------------------------------------
# Overrides


def _split(word: str) -> tuple[str, Any, str]:
    key, equals, text = word.partition("=")
    key = key.strip().removeprefix("--")
    if not equals or not key or not all(key.split(".")):
        raise RecipeError(f"command line: {word}: write KEY=VALUE, for example train.epochs=2")
    return key, parse_yaml_value(text, word), word


def _override(document: Document, key: str, value: Any, word: str) -> None:
    path: KeyPath = tuple(key.split("."))
    kinds = members(annotation_at(path, document.tree))
    if str in kinds and isinstance(value, (int, float)) and type(value) not in kinds:
        # The schema asks for text here, so 007 on the command line is those three characters.
        value = word.partition("=")[2].strip()
    document.set(path, value, Place(key, override=word))


def _fill_sections(document: Document) -> None:
    """`method: {rank: 16}` without a type is the default kind; a section with nothing in it is not there."""
    for name, info in Recipe.model_fields.items():
        section = document.tree.get(name)
        if section is None:
            document.tree.pop(name, None)
        if len(specs(info.annotation)) > 1 and isinstance(section, dict) and "type" not in section:
            document.tree[name] = {"type": tag(type(info.default)), **section}


def _default_output(document: Document, path: Path) -> None:
    """Two recipes never share a run directory by accident."""
    train = document.tree.setdefault("train", {})
    if isinstance(train, dict) and "output" not in train:
        train["output"] = f"runs/{path.stem}"


def _find_directory(recipe: Recipe, document: Document) -> Recipe:
    """Data stands relative to the working directory; where it is not there, beside the recipe file."""
    directory = Path(recipe.data.directory)
    if document.path is None or directory.is_absolute() or directory.exists():
        return recipe
    beside = document.path.parent / directory
    if not beside.is_dir():
        return recipe
    document.notes.append(f"data.directory: no folder {directory} here; using {beside}, beside the recipe")
    data = recipe.data.model_copy(update={"directory": str(beside)})
    return recipe.model_copy(update={"data": data})


# --------------------------------------------------------------------------------------------------
# Provenance


def leaves(spec: Spec, path: KeyPath = ()) -> dict[KeyPath, Any]:
    """Every value of a recipe by its path; lists, mappings and what a section nests are one value each."""
    values: dict[KeyPath, Any] = {}
    for name in type(spec).model_fields:
        value = getattr(spec, name)
        if isinstance(value, Spec) and not path:
            values |= leaves(value, (*path, name))
        else:
            values[*path, name] = value
    return values


def _origins(recipe: Recipe, document: Document) -> dict[str, str]:
    return {dotted(path): _origin(path, document) for path in leaves(recipe)}


def _origin(path: KeyPath, document: Document) -> str:
    """Where a value came from; for a nested one, where its last given part did."""
    inside = [place for key, place in document.places.items() if key[: len(path)] == path]
    place = document.places.get(path, inside[-1] if inside else None)
    return place.describe() if place is not None else DEFAULT


def dump_recipe(loaded: LoadedRecipe, *, everything: bool = True) -> str:
    """YAML of the recipe, the origin of each value as a comment; loads again to the equal recipe.

    everything: False leaves out what nobody gave (a recipe for people, not for the run directory).
    A hub token is never written: the comment in its place says so.
    """
    lines = [f"# note: {note}" for note in loaded.notes]
    section = ""
    for path, value in leaves(loaded.recipe).items():
        key = dotted(path)
        origin = loaded.origins.get(key, DEFAULT)
        if origin == DEFAULT and not everything and path[-1] != "type":
            continue
        if path[0] != section:
            section = str(path[0])
            lines.append(f"{section}:")
        if key in loaded.secrets and value is not None:
            lines.append(f"  # {path[-1]} is not written down; set HF_TOKEN instead")
            continue
        text = f"  {path[-1]}: {dump_value(_plain(value))}"
        lines.append(f"{text}  # {origin}")
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> Any:
    """The value without pydantic, tuples as lists, a data set's unset fields left out."""
    if isinstance(value, Spec):
        dumped: dict[str, Any] = value.model_dump(mode="json", exclude_defaults=True)
        for name, field in type(value).model_fields.items():
            inner = getattr(value, name)
            # What tells kinds apart is written even where it is the default of its kind.
            if name == "type" or (isinstance(inner, Spec) and inner != field.default):
                dumped[name] = _plain(inner)
        return dumped
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value
