"""The two sides of a translation: the flat LLaMA-Factory file that is read, the recipe that is written."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field, replace
from typing import Any

from luthier.recipe.earlier_keys import OLDER_NAMES
from luthier.recipe.key_rules import Rule
from luthier.recipe.known_keys import KEYS
from luthier.recipe.problems import found, nearest
from luthier.recipe.source import Document, KeyPath, Place, dotted, inner_paths
from luthier.types import RecipeError

TOOL_DEFAULT = "LLaMA-Factory default"
"""The origin of a value that the file left to that tool, where Luthier's own default is another."""


@dataclass
class Flat:
    """The flat file on one side, the recipe that grows from it on the other."""

    source: Document
    native: Document = field(init=False)
    problems: list[tuple[int, str]] = field(default_factory=list)
    """Lines of the file and what is wrong in them."""
    older: list[str] = field(default_factory=list)
    """Older names that the file uses; each now stands under its present name."""

    def __post_init__(self) -> None:
        tree, places = self.source.tree, self.source.places
        for older in [key for key in tree if key in OLDER_NAMES]:
            name = OLDER_NAMES[older]
            if name in tree:
                text = f"another name of {places[name,].key}, which is given too; keep one"
                self.problem(older, text)
            else:
                tree[name], places[name,] = tree[older], places[older,]
                self.older.append(older)
            del tree[older]
        self.native = Document({}, {}, self.source.label, self.source.path, list(self.source.notes))

    def given(self, key: str) -> bool:
        """Whether the file says something; null says nothing there."""
        return self.source.tree.get(key) is not None

    def get(self, key: str) -> Any:
        return self.source.tree[key] if self.given(key) else KEYS[key].default

    def written(self, key: str) -> str:
        """The name under which the file gives a key."""
        place = self.source.places.get((key,))
        return key if place is None else place.key

    def changed(self, key: str) -> bool:
        """Whether the file says something other than LLaMA-Factory's default."""
        value, entry = self.get(key), KEYS[key]
        if entry.only_with and not self.get(entry.only_with):
            return False
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
            origin = None if written.override else f"translated from {written.key}{line}"
            place = replace(written, origin=origin)
        self.native.set(path, value, place)
        for inner in inner_paths(value, path):
            self.native.places[inner] = place

    def drop(self, target: str) -> None:
        """Leave a value of the recipe to Luthier's own default."""
        section, name = target.split(".")
        del self.native.tree[section][name], self.native.places[section, name]

    def problem(self, key: str, text: str) -> None:
        line = self.source.place((key,)).line
        problem = (0 if line is None else line, self.source.problem((key,), text))
        if problem not in self.problems:  # a key that two subjects read is wrong once
            self.problems.append(problem)

    def refuse(self) -> None:
        """Raises RecipeError with all problems, in the order of the file, if there are any."""
        if self.problems:
            raise RecipeError("\n".join(text for _, text in sorted(self.problems, key=lambda item: item[0])))

    def note(self, text: str) -> None:
        self.native.notes.append(text)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            self.problem(key, f"expected true or false, found {found(value)}")
        return value is True

    def number(self, key: str) -> float | int:
        value = self.get(key)
        plain = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not plain or not abs(value) <= sys.float_info.max:  # NaN is not below anything
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
        return self.chosen(key, self.get(key), choices)

    def chosen(self, key: str, value: Any, choices: tuple[str, ...]) -> str:
        """The choice that `value`, what the key says or a part of it, is."""
        # YAML reads a bare `no` as false.
        value = "no" if value is False and "no" in choices else value
        if value not in choices:
            near = nearest(value, list(choices)) if isinstance(value, str) else None
            hint = f"did you mean {near}? Choose from" if near else "choose from"
            text = repr(value) if isinstance(value, str) else found(value)
            self.problem(key, f"{text} is none of its values; {hint} {', '.join(choices)}")
        return str(value)

    def every(self, key: str) -> int:
        """A number of steps; below 1 it is a share of all of them, which only `max_steps` can tell."""
        value = self.number(key)
        if 0 < value < 1:
            steps = self.number("max_steps")
            if steps > 0:
                return math.ceil(steps * value)
            self.problem(key, "a share of all steps needs max_steps; give a number of steps")
            return 1
        if value != int(value) or value <= 0:
            self.problem(key, f"expected a positive number of steps, found {found(value)}")
        return int(value)
