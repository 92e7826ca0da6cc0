"""Made-up calls, and the text that a chat template writes for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from luthier.types import ToolCall

NAMES = ("made_up_tool", "other_tool_so")
ARGUMENTS: tuple[Mapping[str, str], ...] = (
    {"made_up_key": "made up value", "second_key": "second value so"},
    {"third_key": "a third value", "last_key": "a last value"},
)
CALLS = (
    # Nine letters and digits, which is what Mistral's templates take.
    ToolCall(NAMES[0], ARGUMENTS[0], "a1b2c3d4e"),
    ToolCall(NAMES[1], ARGUMENTS[1], "f6g7h8i9j"),
)
TOOLS: tuple[Mapping[str, Any], ...] = tuple(
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Made up.",
            "parameters": {
                "type": "object",
                "properties": {key: {"type": "string", "description": "Made up."} for key in arguments},
                "required": list(arguments),
            },
        },
    }
    for name, arguments in zip(NAMES, ARGUMENTS, strict=True)
)


@dataclass(frozen=True, slots=True)
class Probe:
    """What a template writes for the first call and for both, "" where it takes no two; and its source."""

    one: str
    two: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands around the calls: before and after all of them, before and after each."""

    head: str
    opens: str
    closes: str
    tail: str


def frame(probe: Probe, size: int, second: int) -> Frame:
    """The frame, where a call without its frame has `size` characters, or `second` as the second of two."""
    start = probe.one.index(NAMES[0])
    before, after = probe.one[:start], probe.one[start + size :]
    first, other = probe.two.find(NAMES[0]), probe.two.find(NAMES[1])
    if first < 0 or other < first + size:
        return Frame("", before.strip(), after.strip(), "")
    middle = probe.two[first + size : other]
    opens = _from_a_mark(_common_end(before, middle), before)
    closes = _common_start(after, middle[: len(middle) - len(opens)])
    return Frame(
        before[: len(before) - len(opens)].strip(),
        opens.strip(),
        closes.strip(),
        probe.two[other + second :].strip().removeprefix(closes.strip()).strip(),
    )


def _from_a_mark(end: str, whole: str) -> str:
    """The common end of two texts from the first mark or line in it: `>` may be the end of two different marks."""
    begins = [at for at in (end.find("<"), end.find("["), end.find("\n")) if at >= 0]
    return end if end == whole or not begins else end[min(begins) :]


def _common_start(a: str, b: str) -> str:
    size = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:size]


def _common_end(a: str, b: str) -> str:
    return _common_start(a[::-1], b[::-1])[::-1]
