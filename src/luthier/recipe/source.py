"""A recipe as it was written: plain values, and for every key the place where it stands.

YAML is read through PyYAML's nodes, because a plain `safe_load` forgets lines, lets the last of two equal
keys win, and reads `1e-4` as text. Numbers follow YAML 1.2's core schema, so `010` is ten and `1:30` is
text; `yes`, `no`, `on` and `off` stay truth values, as users of YAML 1.1 tools write them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from luthier.recipe.json_lines import key_lines
from luthier.types import RecipeError

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value was written: `file`:`line` under the name `key`, or the command-line word `override`."""

    key: str
    file: str | None = None
    line: int | None = None
    override: str | None = None
    origin: str | None = None
    """What provenance says, where it is neither a line nor the command line."""

    def describe(self) -> str:
        """The words that stand in `LoadedRecipe.origins`."""
        if self.origin is not None:
            return self.origin
        if self.override is not None:
            return "command line"
        if self.line is not None:
            return f"{Path(self.file).name if self.file else 'recipe'}:{self.line}"
        return "given"

    def problem(self, text: str, key: str | None = None) -> str:
        """One line of an error message: where, which key, what is wrong."""
        name = self.key if key is None else key
        if self.override is not None:
            start = f"command line: {self.override}: "
            return start + (text if name and self.override.startswith(f"{name}=") else f"{name}: {text}")
        where = "" if self.file is None else f"{self.file}:{self.line}: " if self.line else f"{self.file}: "
        return f"{where}{name}: {text}" if name else f"{where}{text}"


@dataclass(slots=True)
class Document:
    """A tree of plain values and the place of every key and list item in it."""

    tree: dict[str, Any]
    places: dict[KeyPath, Place]
    label: str | None = None
    """What messages call the file; None for a mapping that was given in Python."""
    path: Path | None = None
    notes: list[str] = field(default_factory=list)

    def place(self, path: KeyPath) -> Place:
        """The place of `path`, or of the nearest part of the tree around it."""
        for length in range(len(path), 0, -1):
            found = self.places.get(path[:length])
            if found is not None:
                return found
        return Place(key="", file=self.label)

    def problem(self, path: KeyPath, text: str) -> str:
        """A message line about `path`, named as the user wrote it."""
        exact = self.places.get(path)
        if exact is not None:
            return exact.problem(text)
        return self.place(path).problem(text, dotted(path))

    def set(self, path: KeyPath, value: Any, place: Place) -> None:
        """Put `value` at `path` in place of what stood there. Raises RecipeError where that cannot be."""
        here: Any = self.tree
        for depth, part in enumerate(path[:-1], start=1):
            if here.get(part) is None:
                here[part] = {}
                self.places[path[:depth]] = replace(place, key=dotted(path[:depth]))
            here = here[part]
            if not isinstance(here, dict):
                whole = dotted(path[:depth])
                raise RecipeError(place.problem(f"{whole} is no mapping of keys; give {whole} as a whole"))
        for known in [known for known in self.places if known[: len(path)] == path]:
            del self.places[known]
        here[path[-1]] = value
        self.places[path] = place
        for inner in inner_paths(value, path):
            self.places[inner] = replace(place, key=dotted(inner))


def dotted(path: KeyPath) -> str:
    """('data', 'train', 0) -> 'data.train[0]'."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def inner_paths(value: Any, path: KeyPath) -> list[KeyPath]:
    """Paths of everything inside `value`, which stands at `path`."""
    inner: list[KeyPath] = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        inner += [(*path, key), *inner_paths(item, (*path, key))]
    return inner


# --------------------------------------------------------------------------------------------------
# YAML

_INT = re.compile(r"^[-+]?[0-9][0-9_]*$|^0x[0-9a-fA-F]+$|^0o[0-7]+$")
_FLOAT = re.compile(
    r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$"
    r"|^\.(?:nan|NaN|NAN)$"
)
_BOOL = re.compile(r"^(?:yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)$")
_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")


def _resolvers() -> dict[str | None, list[tuple[str, re.Pattern[str]]]]:
    rules = (
        ("bool", _BOOL, "yYnNtTfFoO"),
        ("int", _INT, "-+0123456789"),
        ("float", _FLOAT, "-+0123456789."),
        ("merge", re.compile(r"^<<$"), "<"),
        ("null", _NULL, "~nN\0"),
    )
    table: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {}
    for name, pattern, firsts in rules:
        for first in firsts:
            # PyYAML looks the empty scalar up under the empty string.
            rule = (f"tag:yaml.org,2002:{name}", pattern)
            table.setdefault("" if first == "\0" else first, []).append(rule)
    return table


class RecipeYamlLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the numbers of YAML 1.2 and no dates."""

    yaml_implicit_resolvers = _resolvers()


class RecipeYamlDumper(yaml.SafeDumper):
    """Quotes exactly what `RecipeYamlLoader` would otherwise read as something else than text."""

    yaml_implicit_resolvers = _resolvers()

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _scalar(loader: RecipeYamlLoader, node: yaml.ScalarNode) -> Any:
    text = node.value.replace("_", "")
    match node.tag.rpartition(":")[2]:
        case "int":
            return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
        case "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return loader.construct_object(node, deep=True)


class _Builder:
    """Turns YAML nodes into plain values, noting the line of every key and collecting what is wrong."""

    def __init__(self, loader: RecipeYamlLoader, label: str | None) -> None:
        self.loader = loader
        self.label = label
        self.places: dict[KeyPath, Place] = {}
        self.problems: list[str] = []
        self.open: list[int] = []

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        if id(node) in self.open:
            raise RecipeError(self._at(node, dotted(path), "an alias (*) that contains itself"))
        self.open.append(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                return [self._item(child, (*path, index)) for index, child in enumerate(node.value)]
            return self._plain(node, path)  # type: ignore[arg-type]
        except yaml.constructor.ConstructorError as error:
            message = f"YAML tag {node.tag} is not allowed here"
            raise RecipeError(self._at(node, dotted(path), message)) from error
        finally:
            self.open.pop()

    def _plain(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        try:
            value = _scalar(self.loader, node)
        except (ValueError, KeyError) as error:  # `!!int x`, and numbers of thousands of digits
            kind = node.tag.rpartition(":")[2]
            message = f"{node.value[:20]!r} cannot be read as {kind}"
            raise RecipeError(self._at(node, dotted(path), message)) from error
        if value is None or isinstance(value, (str, bool, int, float)):
            return value
        raise RecipeError(self._at(node, dotted(path), f"YAML tag {node.tag} is not allowed here"))

    def _item(self, node: yaml.Node, path: KeyPath) -> Any:
        self.places[path] = Place(dotted(path), self.label, node.start_mark.line + 1)
        return self.build(node, path)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        first_lines: dict[str, int] = {}
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(self._at(key_node, dotted(path), "a key should be a plain word"))
            elif key_node.tag.endswith(":merge"):
                continue
            elif key_node.value in first_lines:
                name, earlier = dotted((*path, key_node.value)), first_lines[key_node.value]
                message = f"given twice, first in line {earlier}; keep one"
                self.problems.append(self._at(key_node, name, message))
            else:
                first_lines[key_node.value] = line
        if any(key_node.tag.endswith(":merge") for key_node, _ in node.value):
            try:
                self.loader.flatten_mapping(node)
            except yaml.constructor.ConstructorError as error:
                message = "<< takes a mapping or a list of mappings"
                raise RecipeError(self._at(node, dotted(path), message)) from error
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                # A key is always its own text: `on:` or `1:` name a key, they are no truth value or number.
                inner = (*path, key_node.value)
                self.places[inner] = Place(dotted(inner), self.label, key_node.start_mark.line + 1)
                values[key_node.value] = self.build(value_node, inner)
        return values

    def _at(self, node: yaml.Node, key: str, text: str) -> str:
        return Place(key, self.label, node.start_mark.line + 1).problem(text)


def _yaml_problem(label: str | None, error: yaml.YAMLError) -> RecipeError:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    text = getattr(error, "problem", None) or getattr(error, "reason", None) or "not readable"
    if "'\\t'" in text:
        text = "a tab; YAML indents with spaces"
    context = getattr(error, "context", None)
    line = mark.line + 1 if mark is not None else None
    column = f", column {mark.column + 1}" if mark is not None else ""
    message = f"not valid YAML{column}: {context + ', ' if context else ''}{text}"
    return RecipeError(Place("", label, line).problem(message))


def parse_yaml_value(text: str, override: str) -> Any:
    """The value of one command-line word, read as YAML; nothing means null."""
    loader = RecipeYamlLoader(text)
    try:
        node = loader.get_single_node()
        builder = _Builder(loader, None)
        value = None if node is None else builder.build(node, ())
    except yaml.YAMLError as error:
        raise RecipeError(
            f"command line: {override}: not a YAML value ({getattr(error, 'problem', error)}); quote it"
        ) from error
    except RecipeError as error:
        raise RecipeError(f"command line: {override}: {error}") from error
    finally:
        loader.dispose()
    if builder.problems:
        raise RecipeError(f"command line: {override}: {builder.problems[0]}")
    return value


def dump_value(value: Any) -> str:
    """One value on one line of YAML that `read_text` reads back as the same value."""
    text: str = yaml.dump(
        value,
        Dumper=RecipeYamlDumper,
        default_flow_style=True,
        sort_keys=False,
        allow_unicode=True,
        width=float("inf"),
    )
    return text.removesuffix("\n").removesuffix("...").removesuffix("\n")


# --------------------------------------------------------------------------------------------------
# JSON


def _json_places(text: str, label: str | None) -> tuple[dict[KeyPath, Place], list[str]]:
    """Places of all keys of a JSON text that is known to be valid, and its duplicate keys."""
    places: dict[KeyPath, Place] = {}
    twice: dict[KeyPath, str] = {}
    for path, line in key_lines(text):
        place = Place(dotted(path), label, line)
        if path in places:
            twice[path] = place.problem(f"given twice, first in line {places[path].line}; keep one")
        else:
            places[path] = place
    # What is inside a key that is given twice is no problem of its own.
    outer = [path for path in twice if not any(path[:length] in twice for length in range(1, len(path)))]
    return places, [twice[path] for path in outer]


# --------------------------------------------------------------------------------------------------
# Documents


RECIPE = (
    "a recipe names at least model.path and data.train",
    "a recipe is a mapping of keys (`model:`, `data:`, ...)",
)
"""What is said of an empty file, and of one that holds no mapping."""


def read_file(path: Path, label: str | None = None, shape: tuple[str, str] = RECIPE) -> Document:
    """Read a .yaml, .yml or .json file. Raises RecipeError naming file and line."""
    label = str(path) if label is None else label
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{label}: no such file") from None
    except IsADirectoryError:
        raise RecipeError(f"{label}: is a folder; give the recipe file in it") from None
    except OSError as error:
        raise RecipeError(f"{label}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{label}: not UTF-8 text (byte {error.start})") from error
    try:
        document = read_text(text, label, as_json=path.suffix.lower() == ".json", shape=shape)
    except RecursionError:
        raise RecipeError(f"{label}: brackets nested too deeply; {shape[1]}") from None
    document.path = path
    return document


def read_text(
    text: str, label: str | None, *, as_json: bool = False, shape: tuple[str, str] = RECIPE
) -> Document:
    """Parse a recipe's text. Raises RecipeError that lists every structural problem with its line."""
    problems: list[str]
    if as_json:
        try:
            tree = json.loads(text)
        except json.JSONDecodeError as error:
            message = f"not valid JSON, column {error.colno}: {error.msg}"
            raise RecipeError(Place("", label, error.lineno).problem(message)) from error
        places, problems = _json_places(text, label)
    else:
        try:
            loader = RecipeYamlLoader(text)
            node = loader.get_single_node()
        except yaml.YAMLError as error:
            raise _yaml_problem(label, error) from error
        builder = _Builder(loader, label)
        tree = None if node is None else builder.build(node, ())
        places, problems = builder.places, builder.problems
    if problems:
        raise RecipeError("\n".join(problems))
    if tree is None:
        raise RecipeError(f"{label}: the file is empty; {shape[0]}")
    if not isinstance(tree, dict):
        raise RecipeError(f"{label}: {shape[1]}")
    return Document(tree, places, label)


def from_mapping(source: Mapping[str, Any]) -> Document:
    """A recipe that was given as a Python mapping; tuples in it are lists."""
    tree = _plain(source)
    document = Document(tree, {})
    document.places = {path: Place(dotted(path)) for path in inner_paths(tree, ())}
    return document


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if value is not None and not isinstance(value, (str, bool, int, float)):
        raise RecipeError(f"a recipe holds text, numbers, lists and mappings, no {type(value).__name__}")
    return value
