"""Gemma 4's calls: `<|tool_call>call:look{days:3,place:<|"|>Rome<|"|>}<tool_call|>`.

Keys stand bare in the call and inside objects, strings between marks; numbers, true, false, lists and objects as in
JSON. A string that holds the mark, and a key with a colon, are what the format cannot carry.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from luthier.data.calls.form import MISSING, Calls, MarkedForm, Offered, json_or
from luthier.data.calls.probe import NAMES, Probe
from luthier.types import ToolCall

QUOTE = '<|"|>'
_CALL = re.compile(r"\s*call:([^\s{}]+)(?=\{)")
_BARE = re.compile(r"[^,\[\]{}:]+")
_WORDS: dict[str, Any] = {"true": True, "false": False, "null": None, "None": None}


@dataclass(frozen=True, slots=True)
class GemmaForm(MarkedForm):
    """`opens` call:NAME{...} `closes`."""

    opens: str = "<|tool_call>"
    closes: str = "<tool_call|>"

    @property
    def begins(self) -> str:
        return self.opens

    @property
    def marks(self) -> tuple[str, ...]:
        return (self.opens, self.closes, QUOTE)

    def calls(self, text: str, tools: Offered) -> tuple[Calls, str] | None:
        found: list[ToolCall] = []
        while text.startswith(self.opens):
            match = _CALL.match(text, len(self.opens))
            if match is None:
                return None
            try:
                arguments, end = _value(text, match.end())
            except (ValueError, IndexError, RecursionError):
                return None
            found.append(ToolCall(match[1], arguments))
            text = text[end:].lstrip().removeprefix(self.closes).lstrip()
        return tuple(found), text


def learn(probe: Probe) -> GemmaForm | None:
    """The form, where the made-up call is written so."""
    opens, found, rest = probe.one.partition(f"call:{NAMES[0]}{{")
    if not found or QUOTE not in rest:
        return None
    return GemmaForm(opens.strip(), rest[rest.rindex("}") + 1 :].strip())


def _value(text: str, at: int) -> tuple[Any, int]:
    """The value that begins at a place, and where it ends. Raises ValueError and IndexError where there is none."""
    if text.startswith(QUOTE, at):
        end = text.index(QUOTE, at + len(QUOTE))
        return text[at + len(QUOTE) : end], end + len(QUOTE)
    if text[at] == "{":
        return _object(text, at + 1)
    if text[at] == "[":
        return _list(text, at + 1)
    match = _BARE.match(text, at)
    word = match[0].strip() if match else ""
    value = _WORDS[word] if word in _WORDS else json_or(word)
    if match is None or value is MISSING:
        raise ValueError("no value")
    return value, match.end()


def _object(text: str, at: int) -> tuple[dict[str, Any], int]:
    found: dict[str, Any] = {}
    while text[at] != "}":
        if found:
            at = _past(text, at, ",")
        if text.startswith(QUOTE, at):
            key, at = _value(text, at)
        else:
            end = text.index(":", at)
            key, at = text[at:end].strip(), end
        found[key], at = _value(text, _past(text, at, ":"))
    return found, at + 1


def _list(text: str, at: int) -> tuple[list[Any], int]:
    found: list[Any] = []
    while text[at] != "]":
        if found:
            at = _past(text, at, ",")
        value, at = _value(text, at)
        found.append(value)
    return found, at + 1


def _past(text: str, at: int, mark: str) -> int:
    if text[at] != mark:
        raise ValueError(f"no {mark}")
    return at + 1
