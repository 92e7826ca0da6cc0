"""A call as a name and then its arguments as JSON: GLM-4, DeepSeek, Kimi, later Mistral models, ReAct."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from luthier.data.calls.form import ID, MISSING, Calls, MarkedForm, Offered, json_at, spaced
from luthier.data.calls.probe import ARGUMENTS, NAMES, Probe, frame
from luthier.types import ToolCall


@dataclass(frozen=True, slots=True)
class NamedForm(MarkedForm):
    """`head`, then for each call `opens` name `between` JSON `closes`, then `tail`; all but one of the first two may
    be empty, and an empty `between` is the end of the line."""

    head: str
    opens: str
    between: str
    closes: str
    tail: str
    name: str = r"(?P<name>[^\s<>{}\[\]]+?)"
    """A pattern for the name."""

    @property
    def begins(self) -> str:
        return (self.head or self.opens).split(ID)[0]

    @property
    def marks(self) -> tuple[str, ...]:
        parts = (self.head, self.opens, self.between, self.closes, self.tail)
        return tuple(mark for part in parts for mark in part.split(ID) if mark)

    def calls(self, text: str, tools: Offered) -> tuple[Calls, str] | None:
        between = rf"\s*{spaced(self.between)}\s*" if self.between else r"\s*\n\s*"
        call = re.compile(rf"{spaced(self.opens)}\s*{self.name}{between}(?=\{{)")
        found: list[ToolCall] = []
        text = text.removeprefix(self.head).lstrip()
        while text and (match := call.match(text)):
            arguments, length = json_at(text[match.end() :])
            if not isinstance(arguments, Mapping):
                return None
            found.append(ToolCall(match["name"], arguments))
            text = text[match.end() + length :].lstrip().removeprefix(self.closes).lstrip()
        return (tuple(found), text.removeprefix(self.tail)) if found else None


@dataclass(frozen=True, slots=True)
class LineForm:
    """Without marks, a call is a line that is the name of an offered tool, and JSON from there to the end."""

    @property
    def marks(self) -> tuple[str, ...]:
        return ()

    def certain(self, text: str, tools: Offered) -> str:
        at = 0
        for line in text.splitlines(keepends=True):
            said = line.strip()
            begun = any(name.startswith(said) for name in tools) if line[-1] != "\n" else False
            # An empty line may stand before the call, and is then no part of the content.
            if begun or (said in tools and text[at + len(line) :].lstrip()[:1] in ("", "{")):
                return text[:at].rstrip()
            at += len(line)
        return text.rstrip()

    def read(self, text: str, tools: Offered) -> tuple[str, Calls]:
        at = 0
        for line in text.splitlines(keepends=True):
            rest = text[at + len(line) :].lstrip()
            if line.strip() in tools and rest.startswith("{"):
                arguments, length = json_at(rest)
                if isinstance(arguments, Mapping) and not rest[length:].strip():
                    return text[:at].rstrip(), (ToolCall(line.strip(), arguments),)
                return text, ()
            at += len(line)
        return text, ()


KIMI = NamedForm(
    "<|tool_calls_section_begin|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    "<|tool_calls_section_end|>",
    r"(?:functions\.)?(?P<name>[^\s<>:]+)(?::\d+)?",
)
"""Kimi K2 writes the call's id, which ends with a number, in place of its name."""


def learn(probe: Probe) -> NamedForm | LineForm | None:
    """The form, where JSON arguments follow the made-up name."""
    size, between = _size(probe.one, 0)
    if not size:
        return None
    around = frame(probe, size, _size(probe.two, 1)[0])
    if not (around.head or around.opens):
        return LineForm() if not between.strip() else None
    return NamedForm(around.head, around.opens, between.strip(), around.closes, around.tail)


def _size(text: str, call: int) -> tuple[int, str]:
    """The length of a made-up call from its name to the end of its arguments, and what stands between; 0: none."""
    start = text.find(NAMES[call])
    brace = text.find("{", start)
    if start < 0 or brace < 0:
        return 0, ""
    value, length = json_at(text[brace:])
    if value is MISSING or value != ARGUMENTS[call]:
        return 0, ""
    return brace + length - start, text[start + len(NAMES[call]) : brace]
