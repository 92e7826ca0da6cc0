"""A call as a name and its parameters, each between marks: GLM-4.5, Qwen3-Coder, MiniMax-M2, Seed-OSS.

    <tool_call>\\n<function=NAME>\\n<parameter=KEY>\\nVALUE\\n</parameter>\\n</function>\\n</tool_call>

Strings stand bare and everything else as JSON, so a value is typed by the tool's schema. A string that holds the mark
after a value, followed by what may follow a value, ends there: these formats cannot carry it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from luthier.data.calls.form import Calls, MarkedForm, Offered, schema_of, spaced, typed
from luthier.data.calls.probe import ARGUMENTS, NAMES, Frame, Probe, frame
from luthier.types import ToolCall


@dataclass(frozen=True, slots=True)
class ParameterForm(MarkedForm):
    """`around` all calls and each; after its name `name_closes`, and the marks of a parameter. `lines`: a value has
    lines of its own."""

    around: Frame
    name_closes: str
    key_opens: str
    key_closes: str
    value_closes: str
    lines: bool

    @property
    def begins(self) -> str:
        return self.around.head or self.around.opens

    @property
    def marks(self) -> tuple[str, ...]:
        around = self.around
        parts = (around.head, around.opens, around.closes, around.tail, self.key_opens, self.key_closes)
        return tuple(dict.fromkeys(part for part in (*parts, self.value_closes) if part))

    def calls(self, text: str, tools: Offered) -> tuple[Calls, str] | None:
        around = self.around
        opens = re.compile(rf"{spaced(around.opens)}\s*(?P<name>[^\s<>\"=]+){spaced(self.name_closes)}\s*")
        closes = re.compile(spaced(around.closes) + r"\s*")
        found: list[ToolCall] = []
        text = text.removeprefix(around.head).lstrip() if around.head else text
        while text and (match := opens.match(text)):
            read = self._arguments(text[match.end() :], match["name"], tools)
            end = closes.match(read[1]) if read else None
            if read is None or end is None:
                return None
            found.append(ToolCall(match["name"], read[0]))
            text = read[1][end.end() :]
        return (tuple(found), text.removeprefix(around.tail)) if found else None

    def _arguments(self, text: str, name: str, tools: Offered) -> tuple[dict[str, Any], str] | None:
        """The parameters at the beginning of a text, and what follows them."""
        # DeepSeek V3.2 and V4 say there whether the value is a string, which the schema says, too
        key_closes = spaced(self.key_closes).replace('"true"', '"(?:true|false)"')
        follows = rf"\s*(?:{spaced(self.key_opens)}|{spaced(self.around.closes)})"
        one = re.compile(
            rf"{spaced(self.key_opens)}(?P<key>.*?){key_closes}(?P<value>.*?)"
            rf"{spaced(self.value_closes)}(?={follows})\s*",
            re.DOTALL,
        )
        arguments: dict[str, Any] = {}
        while match := one.match(text):
            key, value = match["key"], match["value"]
            if self.lines:
                value = value.removeprefix("\n").removesuffix("\n")
            arguments[key] = typed(value, schema_of(tools, name, key))
            text = text[match.end() :]
        return arguments, text


def learn(probe: Probe) -> ParameterForm | None:
    """The form, where the made-up keys and values follow the name, each between marks."""
    gaps = _gaps(probe.one, 0)
    others = _gaps(probe.two, 1)
    if gaps is None:
        return None
    after_name, after_key, after_value, size = gaps
    # What opens a key is the last mark before it; what stands before that belongs to the name, or to the value.
    key_opens = after_name[max(after_name.rfind("<"), 0) :].strip()
    if not key_opens or key_opens not in after_value:
        return None
    value_closes = after_value[: after_value.rindex(key_opens)]
    if not value_closes.strip() or not after_key.strip():
        return None
    around = frame(probe, size, others[3] if others else 0)
    full = (probe.one[probe.one.index(NAMES[0]) + size :]).lstrip()
    if not full.startswith(value_closes.strip()):
        return None
    closes = around.closes.removeprefix(value_closes.strip()).strip()
    return ParameterForm(
        Frame(around.head, around.opens, closes, around.tail),
        after_name[: after_name.rindex(key_opens)].strip(),
        key_opens,
        after_key.rstrip(),
        value_closes.strip(),
        after_key.endswith("\n"),
    )


def _gaps(text: str, call: int) -> tuple[str, str, str, int] | None:
    """What stands after the name, the first key and the first value, and the length from name to the last value."""
    (key, value), (second, last) = ARGUMENTS[call].items()
    places, at = [], text.find(NAMES[call])
    if at < 0:
        return None
    start = at
    for part in (NAMES[call], key, value, second, last):
        found = text.find(part, at)
        if found < 0:
            return None
        places.append((found, found + len(part)))
        at = found + len(part)
    gaps = [text[a[1] : b[0]] for a, b in pairwise(places)]
    return gaps[0], gaps[1], gaps[2], places[-1][1] - start
