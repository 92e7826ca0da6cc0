"""The two sides of a translation: the flat LLaMA-Factory file that is read, the recipe that is written."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from luthier.recipe.llamafactory_keys import TOOL_KEYS, Key, Rule
from luthier.recipe.problems import found, nearest
from luthier.recipe.source import Document, KeyPath, Place, dotted, inner_paths
from luthier.recipe.training_keys import OLDER_NAMES, TRAINING_KEYS

KEYS: dict[str, Key] = TOOL_KEYS | TRAINING_KEYS
TOOL_DEFAULT = "LLaMA-Factory default"
"""The origin of a value that the file left to that tool, where Luthier's own default is another."""


@dataclass
class Flat:
    """The flat file on one side, the recipe that grows from it on the other."""

    source: Document
    native: Document = field(init=False)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for older, name in OLDER_NAMES.items():
            if older in self.source.tree and name not in self.source.tree:
                self.source.tree[name] = self.source.tree.pop(older)
                self.source.places[(name,)] = self.source.places[(older,)]
        self.native = Document({}, {}, self.source.label, self.source.path, list(self.source.notes))

    def given(self, key: str) -> bool:
        """Whether the file says something; null says nothing there."""
        return self.source.tree.get(key) is not None

    def get(self, key: str) -> Any:
        return self.source.tree[key] if self.given(key) else KEYS[key].default

    def changed(self, key: str) -> bool:
        """Whether the file says something other than LLaMA-Factory's default."""
        value, entry = self.get(key), KEYS[key]
        if entry.rule is Rule.REFUSED and not entry.default:
            return bool(value)  # `deepspeed: ""` and `fsdp: false` say what silence says
        return bool(value != entry.default or isinstance(value, bool) != isinstance(entry.default, bool))

    def put(self, target: str, value: Any, *keys: str) -> None:
        """Write a value to the recipe, its place that of the first of `keys` that the file has."""
        path: KeyPath = tuple(target.split("."))
        key = next((key for key in keys if self.given(key)), None)
        place = Place(dotted(path), self.source.label, origin=TOOL_DEFAULT)
        if key is not None:
            written = self.source.places[(key,)]
            line = f" (line {written.line})" if written.line else ""
            origin = None if written.override else f"translated from {key}{line}"
            place = replace(written, origin=origin)
        self.native.set(path, value, place)
        for inner in inner_paths(value, path):
            self.native.places[inner] = place

    def drop(self, target: str) -> None:
        """Leave a value of the recipe to Luthier's own default."""
        section, name = target.split(".")
        del self.native.tree[section][name], self.native.places[section, name]

    def problem(self, key: str, text: str) -> None:
        self.problems.append(self.source.problem((key,), text))

    def note(self, text: str) -> None:
        self.native.notes.append(text)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            self.problem(key, f"expected true or false, found {found(value)}")
        return value is True

    def number(self, key: str) -> float | int:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            self.problem(key, f"expected a number, found {found(value)}")
            value = KEYS[key].default or 0  # what the checks that follow have no quarrel with
        return float(value) if isinstance(value, float) else int(value)

    def names(self, key: str) -> list[str]:
        """A list that is written as `a, b`."""
        value = self.get(key)
        if value is None:
            return []
        if isinstance(value, str):
            return [name.strip() for name in value.split(",") if name.strip()]
        if isinstance(value, list) and all(isinstance(name, str) for name in value):
            return value
        self.problem(key, f"expected names with commas between them, found {found(value)}")
        return []

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        value = self.get(key)
        # YAML reads a bare `no` as false.
        value = "no" if value is False and "no" in choices else value
        if value not in choices:
            near = nearest(value, list(choices)) if isinstance(value, str) else None
            hint = f"did you mean {near}? Choose from" if near else "choose from"
            text = repr(value) if isinstance(value, str) else found(value)
            self.problem(key, f"{text} is none of its values; {hint} {', '.join(choices)}")
        return str(value)

    def every(self, key: str) -> int:
        """A number of steps."""
        value = self.number(key)
        if 0 < value < 1:
            self.problem(key, "a share of all steps comes in a later version; give a number of steps")
        elif value != int(value) or value <= 0:
            self.problem(key, f"expected a positive number of steps, found {found(value)}")
        return int(value)
