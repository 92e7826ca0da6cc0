"""What every form of tool calls can do, and what the forms share.

CallForm          reads the calls out of an answer's text
MarkedForm        the same where a mark begins the calls
typed(text, ...)  an argument that was written as bare text, as the value that the tool's schema asks for
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Protocol

from luthier.types import ToolCall

Offered = Collection[str]
"""Names of the tools that may be called; as a mapping, each with the JSON schema of its parameters."""
Calls = tuple[ToolCall, ...]
ID = "\ue000"
"""Where the id of a call stands in a mark."""
MISSING = object()
"""No value: None is one in JSON."""


_PYTHON: Mapping[str, Any] = {"True": True, "False": False, "None": None}


class CallForm(Protocol):
    """One way of writing calls."""

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts that belong to an answer even where they are special tokens."""

    def certain(self, text: str, tools: Offered) -> str:
        """The beginning of an answer that goes on which is content whatever follows."""

    def read(self, text: str, tools: Offered) -> tuple[str, Calls]:
        """Content and calls of a whole answer; what is no call stays content, to the letter."""


class MarkedForm(ABC):
    """Calls that begin with a mark."""

    @property
    @abstractmethod
    def begins(self) -> str:
        """The mark, which is not empty."""

    @abstractmethod
    def calls(self, text: str, tools: Offered) -> tuple[Calls, str] | None:
        """The calls at the beginning of a text and what follows them; None where it is not what the form writes."""

    def certain(self, text: str, tools: Offered) -> str:
        before, found, _ = text.partition(self.begins)
        return (before if found else without_begun(text, self.begins)).rstrip()

    def read(self, text: str, tools: Offered) -> tuple[str, Calls]:
        at = text.find(self.begins)
        found = self.calls(text[at:], tools) if at >= 0 else None
        if not found or not found[0]:
            return text, ()
        return "\n".join(part for part in (text[:at].rstrip(), found[1].strip()) if part), found[0]


def without_begun(text: str, mark: str) -> str:
    """The text without an end that may be the beginning of a mark."""
    size = next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
    return text[: len(text) - size]


def spaced(mark: str) -> str:
    """A pattern for a mark in which any white space may stand where it has some, and any id for `ID`."""
    pattern = r"\s*".join(re.escape(part) for part in re.split(r"\s+", mark))
    return pattern.replace(ID, r"[\w.-]*")


def json_at(text: str) -> tuple[Any, int]:
    """The JSON value at the beginning of a text and its length; `MISSING` and 0 where there is none."""
    try:
        return json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return MISSING, 0


def json_or(text: str, otherwise: Any = MISSING) -> Any:
    """A text as JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return otherwise


def schema_of(tools: Offered, name: str, key: str) -> Mapping[str, Any]:
    """What the schema of a tool says of one parameter; empty where it says nothing."""
    schema = tools.get(name) if isinstance(tools, Mapping) else None
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    found = properties.get(key) if isinstance(properties, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def typed(text: str, schema: Mapping[str, Any]) -> Any:
    """A bare text as the value that was meant.

    Where the schema allows strings alone it is the text; where it allows no string, JSON. Where it says nothing, or
    allows both, it is JSON if it reads as a value of an allowed type other than a string.
    """
    kinds = set(_kinds(schema))
    if kinds == {"string"}:
        return text
    # Qwen's templates write these three as Python does
    value = _PYTHON.get(text, MISSING)
    value = value if value is not MISSING and _kind(value) & kinds else json_or(text)
    if value is MISSING or isinstance(value, str):
        return text
    return value if not kinds or "string" not in kinds or _kind(value) & kinds else text


def _kinds(schema: Mapping[str, Any]) -> Iterable[str]:
    kind = schema.get("type")
    if isinstance(kind, str):
        yield kind
    elif isinstance(kind, list):
        yield from (part for part in kind if isinstance(part, str))
    elif "enum" in schema and isinstance(schema["enum"], list):
        for value in schema["enum"]:
            yield from _kind(value)
    for key in ("anyOf", "oneOf"):
        parts = schema.get(key)
        for part in parts if isinstance(parts, list) else ():
            yield from _kinds(part) if isinstance(part, Mapping) else ()


def _kind(value: Any) -> set[str]:
    """The names of a value's type in JSON schemas."""
    if value is None:
        return {"null"}
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, int | float):
        return {"number", "integer"} if float(value).is_integer() else {"number"}
    return {"string"} if isinstance(value, str) else {"array"} if isinstance(value, list) else {"object"}
