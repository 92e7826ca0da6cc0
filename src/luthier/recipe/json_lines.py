"""The line of every key and list item of a JSON text, which the standard library's reader forgets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

_BLANK = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def key_lines(text: str) -> Iterator[tuple[tuple[str | int, ...], int]]:
    """(path, line) of everything in a valid JSON text, in its order; a key that is given twice comes twice."""
    found: list[tuple[tuple[str | int, ...], int]] = []
    _walk(text, _skip(text, 0), (), found)
    line, counted = 1, 0
    for path, position in found:
        line += text.count("\n", counted, position)
        counted = position
        yield path, line


def _skip(text: str, position: int) -> int:
    blank = _BLANK.match(text, position)
    return position if blank is None else blank.end()


def _walk(
    text: str, position: int, path: tuple[str | int, ...], found: list[tuple[tuple[str | int, ...], int]]
) -> int:
    """Notes (path, position) of what is inside the value at `position`; the position behind the value."""
    opening = text[position]
    if opening not in "{[":
        return _DECODER.raw_decode(text, position)[1]
    position = _skip(text, position + 1)
    index = 0
    while text[position] not in "}]":
        inner: str | int = index
        start = position
        if opening == "{":
            inner, end = _DECODER.raw_decode(text, position)
            position = _skip(text, _skip(text, end) + 1)
        found.append(((*path, inner), start))
        position = _skip(text, _walk(text, position, (*path, inner), found))
        index += 1
        if text[position] == ",":
            position = _skip(text, position + 1)
    return position + 1
