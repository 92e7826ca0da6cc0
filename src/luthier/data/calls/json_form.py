"""A call as one JSON object: {"name": ..., "arguments": ...}, between marks or bare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from luthier.data.calls.form import MISSING, Calls, MarkedForm, Offered, json_at, json_or
from luthier.data.calls.probe import ARGUMENTS, NAMES, Probe
from luthier.types import ToolCall

PYTHON_TAG = "<|python_tag|>"
"""What Llama 3 models may write before a bare call."""


@dataclass(frozen=True, slots=True)
class JsonForm(MarkedForm):
    """JSON values after `opens`, one or a list in each; `closes`, which may be empty, ends them."""

    opens: str
    closes: str
    name: str
    arguments: str

    @property
    def begins(self) -> str:
        return self.opens

    @property
    def marks(self) -> tuple[str, ...]:
        return tuple(mark for mark in (self.opens, self.closes) if mark)

    def calls(self, text: str, tools: Offered) -> tuple[Calls, str] | None:
        calls: list[ToolCall] = []
        while text.startswith(self.opens):
            text = text[len(self.opens) :].lstrip()
            first = True
            while first or text.startswith(("{", "[{")):
                value, length = json_at(text)
                found = calls_in(value, self.name, self.arguments)
                if found is None:
                    return None
                calls += found
                text, first = text[length:].lstrip(), False
                text = text.removeprefix(",").lstrip() if text.startswith(",") else text
            text = text.removeprefix(self.closes).strip()
        return tuple(calls), text


@dataclass(frozen=True, slots=True)
class BareJson:
    """An answer that is JSON from beginning to end and names a tool that was offered. `tag`: what may stand before."""

    name: str
    arguments: str
    tag: str = ""

    @property
    def marks(self) -> tuple[str, ...]:
        return (self.tag,) if self.tag else ()

    def certain(self, text: str, tools: Offered) -> str:
        lead = text.lstrip()
        begun = not lead or lead[0] in "[{"
        return (
            "" if begun or (self.tag and (self.tag.startswith(lead) or lead.startswith(self.tag))) else text
        )

    def read(self, text: str, tools: Offered) -> tuple[str, Calls]:
        calls: list[ToolCall] = []
        rest = text.strip()
        rest = rest.removeprefix(self.tag).lstrip() if self.tag else rest
        while rest:
            value, length = json_at(rest)
            found = calls_in(value, self.name, self.arguments)
            if found is None or not all(call.name in tools for call in found):
                return text, ()
            calls += found
            # Llama 3 puts a semicolon between several.
            rest = rest[length:].lstrip().removeprefix(";").lstrip()
        return ("", tuple(calls)) if calls else (text, ())


def learn(probe: Probe) -> JsonForm | BareJson | None:
    """The form, where the made-up call is a JSON object."""
    text = probe.one
    for start, character in enumerate(text):
        if character not in "[{":
            continue
        value, length = json_at(text[start:])
        keys = _keys(value)
        if keys is not None:
            opens, closes = text[:start].strip(), text[start + length :].strip()
            tag = PYTHON_TAG if PYTHON_TAG in probe.source else ""
            return JsonForm(opens, closes, *keys) if opens else BareJson(*keys, tag)
    return None


def _keys(value: Any) -> tuple[str, str] | None:
    """The keys of name and arguments in the made-up call."""
    body = _body(value[0] if isinstance(value, list) and value else value)
    named = [key for key, item in body.items() if item == NAMES[0]]
    given = [
        key
        for key, item in body.items()
        if item == ARGUMENTS[0] or (isinstance(item, str) and json_or(item) == ARGUMENTS[0])
    ]
    return (named[0], given[0]) if named and given else None


def calls_in(value: Any, name: str, arguments: str) -> list[ToolCall] | None:
    """The calls of a JSON value; None where it is none."""
    items = value if isinstance(value, list) else [value]
    found = [_call(item, name, arguments) for item in items]
    return [call for call in found if call is not None] if found and None not in found else None


def _call(item: Any, name_key: str, arguments_key: str) -> ToolCall | None:
    body = _body(item)
    name, arguments = body.get(name_key), body.get(arguments_key, {})
    if isinstance(arguments, str):
        arguments = json_or(arguments)
    if arguments is MISSING or not isinstance(name, str) or not isinstance(arguments, Mapping):
        return None
    return ToolCall(name, arguments)


def _body(item: Any) -> Mapping[str, Any]:
    """{name, arguments}, or what {type: function, function: {...}} holds."""
    if not isinstance(item, Mapping):
        return {}
    inner = item.get("function")
    return inner if isinstance(inner, Mapping) else item
