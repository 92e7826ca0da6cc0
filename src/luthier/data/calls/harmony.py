"""Harmony, the form of gpt-oss: an answer is several messages, each with a channel.

    <|channel|>analysis<|message|>...<|end|>                                        reasoning
    <|start|>assistant<|channel|>final<|message|>...                                content
    <|start|>assistant to=functions.look<|channel|>commentary json<|message|>{...}  a call

Source: OpenAI, "OpenAI harmony response format" (2025).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from luthier.data.calls.form import Offered, json_or, without_begun
from luthier.types import ToolCall

_START, _CHANNEL, _MESSAGE, _CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
MARKS = (_START, _CHANNEL, _MESSAGE, _CONSTRAIN, *_ENDS)
_TO = re.compile(r"to=(?:functions\.)?([^\s<]+)")
_HEADER = re.compile(r"(?:<\|start\|>assistant)?\s*(?:to=\S*?)?\s*<\|channel\|>")
_NAME = re.compile(r"<\|channel\|>\s*(\w+)")


@dataclass(frozen=True, slots=True)
class Part:
    """One message; `header` is None for text that has none."""

    header: str | None
    text: str


def is_written(text: str) -> bool:
    """Whether the text of an answer is in this form."""
    return _CHANNEL in text and _MESSAGE in text


def read(text: str, tools: Offered, ended: bool) -> tuple[str, str, tuple[ToolCall, ...]]:
    """Content, reasoning and calls. With `ended` false only what cannot change any more: calls come with the end.

    A call that is malformed, or of which no tool was offered, stays content with its header.
    """
    content: list[str] = []
    reasoning: list[str] = []
    calls: list[ToolCall] = []
    for part in _parts(text, ended):
        header = part.header or ""
        channel = _NAME.search(header)
        to = _TO.search(header)
        if to and not tools and part.header is not None:
            content.append(header + _MESSAGE + part.text)
        elif to:
            arguments = json_or(part.text.strip() or "{}")
            if not ended:
                break
            if isinstance(arguments, Mapping):
                calls.append(ToolCall(to[1], arguments))
            else:
                content.append(header + _MESSAGE + part.text)
        elif channel and channel[1] == "analysis":
            reasoning.append(part.text)
        else:
            content.append(part.text)
    return _joined(content), _joined(reasoning), tuple(calls)


def _joined(texts: list[str]) -> str:
    return "\n\n".join(text for text in texts if text)


def _parts(text: str, ended: bool) -> list[Part]:
    parts: list[Part] = []
    while text:
        if not _HEADER.match(text):
            if not ended and _may_begin(text):
                break
            # text without a header, up to one
            size = text.find(_START + "assistant", 1)
            body, after = (text, "") if size < 0 else (text[:size], text[size:])
            shown = body if ended or after else without_begun(body, _START + "assistant")
            parts.append(Part(None, _without_end(shown, ended or bool(after))))
            text = after
            continue
        header, found, rest = text.partition(_MESSAGE)
        if not found:
            # a header that never ends is text
            parts += [Part(None, text)] if ended else []
            break
        body, text = _body(rest, ended)
        parts.append(Part(header.removeprefix(_START), body))
    return parts


def _body(text: str, ended: bool) -> tuple[str, str]:
    """A message's text and what follows it."""
    places = [(text.find(end), end) for end in (*_ENDS, _START) if end in text]
    if places:
        at, mark = min(places)
        return text[:at], text[at:] if mark == _START else text[at + len(mark) :]
    return _without_end(text, ended), ""


def _without_end(text: str, whole: bool) -> str:
    """The text without what may be the beginning of a mark that ends it."""
    if whole:
        return text
    return min((without_begun(text, mark) for mark in (*_ENDS, _START)), key=len)


def _may_begin(text: str) -> bool:
    lead = text.lstrip()
    begins = (_CHANNEL, "to=", _START + "assistant")
    return any(mark.startswith(lead) or lead.startswith(mark) for mark in begins)
