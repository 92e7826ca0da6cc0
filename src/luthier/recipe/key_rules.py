"""What can become of a key of somebody else's file: the rules, and one entry of the tables that apply them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Any


class Rule(Enum):
    """What happens to a key that is set to something other than its default."""

    READ = auto()
    """Translated together with others, mostly into `target`; `text` may say what is refused of it."""
    DIRECT = auto()
    """Its value goes to `target` as it is."""
    EXTRA = auto()
    """It goes to `train.extra` under its own name."""
    SILENT = auto()
    """It cannot change what is trained here, and nobody misses it."""
    NOTED = auto()
    """It is accepted, and `text` tells the user what is done instead."""
    REFUSED = auto()
    """An error; `text` says what to do."""


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a LLaMA-Factory file: its default in 0.9.5 and what becomes of it here."""

    rule: Rule
    default: Any
    text: str = ""
    target: str = ""
    only_with: str = ""
    """The flag without which the key says nothing there either."""


def keys(rule: Rule, text: str = "", /, **defaults: Any) -> dict[str, Key]:
    return {name: Key(rule, default, text) for name, default in defaults.items()}


def direct(**targets: tuple[str, Any]) -> dict[str, Key]:
    return {name: Key(Rule.DIRECT, default, "", target) for name, (target, default) in targets.items()}


def read(text: str = "", /, **targets: tuple[str, Any]) -> dict[str, Key]:
    return {name: Key(Rule.READ, default, text, target) for name, (target, default) in targets.items()}
