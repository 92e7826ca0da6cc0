"""Calls as a Python list: `<|tool_call_start|>[look(place="Rome", days=3)]<|tool_call_end|>`, LFM2's."""

from __future__ import annotations

import ast
import io
import itertools
import keyword
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from luthier.data.calls.form import Calls, MarkedForm, Offered
from luthier.data.calls.probe import NAMES, Probe
from luthier.types import ToolCall

_PLAIN = "plain_name_"
_KEYWORD = re.compile(rf"\b(?:{'|'.join(keyword.kwlist)})\s*=")
_WORDS = {"true": True, "false": False, "null": None}
"""JSON's words, which models write between Python's."""


@dataclass(frozen=True, slots=True)
class PythonForm(MarkedForm):
    """`opens`, a list of calls with named arguments, `closes`."""

    opens: str
    closes: str

    @property
    def begins(self) -> str:
        return self.opens

    @property
    def marks(self) -> tuple[str, ...]:
        return (self.opens, self.closes)

    def calls(self, text: str, tools: Offered) -> tuple[Calls, str] | None:
        for end in _places(text, self.closes):
            found = _calls(text[len(self.opens) : end].strip())
            if found is not None:
                return found, text[end + len(self.closes) :]
        # the mark after the calls is a token that some engines cut off
        found = _calls(text[len(self.opens) :].strip())
        return None if found is None else (found, "")


LFM2 = PythonForm("<|tool_call_start|>", "<|tool_call_end|>")


def learn(probe: Probe) -> PythonForm | None:
    """The form, where the made-up call is Python between marks."""
    match = re.search(rf"(\S+)\s*\[?{NAMES[0]}\(.*?\)\]?\s*(\S+)\s*$", probe.one, re.DOTALL)
    return PythonForm(match[1].removesuffix("["), match[2].removeprefix("]")) if match else None


def _places(text: str, mark: str) -> Iterator[int]:
    at = text.find(mark)
    while at >= 0:
        yield at
        at = text.find(mark, at + 1)


def _calls(text: str) -> Calls | None:
    try:
        body = ast.parse(_with_plain_names(text), mode="eval").body
        nodes = body.elts if isinstance(body, ast.List) else [body]
        return tuple(_call(node) for node in nodes) or None
    except (SyntaxError, tokenize.TokenError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _with_plain_names(text: str) -> str:
    """The text with arguments such as `from=` under names that Python takes. Raises tokenize.TokenError."""
    if not _KEYWORD.search(text):
        return text
    lines = text.splitlines(keepends=True)
    found = list(tokenize.generate_tokens(io.StringIO(text).readline))
    for token, after in reversed(list(itertools.pairwise(found))):
        if token.type == tokenize.NAME and keyword.iskeyword(token.string) and after.string == "=":
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column] + _PLAIN + lines[row - 1][column:]
    return "".join(lines)


def _call(node: ast.expr) -> ToolCall:
    """Raises ValueError for what is no call with named arguments."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name | ast.Attribute) or node.args:
        raise ValueError("no call")
    arguments: dict[str, Any] = {}
    for given_as in node.keywords:
        # `**{"a key": 1}` has the names that Python cannot write
        given = (
            {given_as.arg.removeprefix(_PLAIN): _value(given_as.value)}
            if given_as.arg
            else _value(given_as.value)
        )
        if not isinstance(given, dict):
            raise ValueError("no argument")
        arguments |= given
    return ToolCall(ast.unparse(node.func), arguments)


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in _WORDS:
        return _WORDS[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(part) for part in node.elts]
    if isinstance(node, ast.Dict):
        keys = [ast.literal_eval(key) if key is not None else None for key in node.keys]
        if not all(isinstance(key, str) for key in keys):
            raise ValueError("no JSON object")
        return {key: _value(value) for key, value in zip(keys, node.values, strict=True)}
    value = ast.literal_eval(node)
    if not isinstance(value, str | int | float | bool | None):
        raise ValueError("no JSON value")
    return value
