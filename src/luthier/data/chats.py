"""Columns of a raw row -> messages and tools, in alpaca's and in sharegpt's or OpenAI's form.

    asked(raw, attr)                     alpaca: everything before the answer
    history(raw, attr)                   sharegpt, openai: the messages column
    conversation(turns, raw, attr, ...)  a list of messages wherever it stands
    cell(raw, column)                    one text

Raises `RowError` and `DataError` as `formats` says.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from luthier.data.media import content_parts
from luthier.data.read import RawRow
from luthier.data.registry import DatasetAttr
from luthier.types import Conversation, DataError, Message, RowError, ToolCall


def asked(raw: RawRow, attr: DatasetAttr) -> Conversation:
    """Alpaca's system message, history and question."""
    columns = attr.columns
    messages: list[Message] = []
    system = cell(raw, columns.system)
    if system:
        messages.append(Message("system", system))
    for question, answer in _history(raw, columns.history):
        messages += [Message("user", question), Message("assistant", answer)]
    parts = [cell(raw, columns.prompt, required=True), cell(raw, columns.query)]
    messages.append(Message("user", "\n".join(part for part in parts if part)))
    return Conversation(tuple(messages), _tools(raw, columns.tools))


def _history(raw: RawRow, column: str | None) -> list[tuple[str, str]]:
    turns = raw.columns.get(column) if column else None
    if turns is None:
        return []
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise DataError(
            f"{raw.place}: {column!r} should be a list of [question, answer], not {type(turns).__name__}"
        )
    for turn in turns:
        if (
            not isinstance(turn, Sequence)
            or len(turn) != 2
            or not all(isinstance(text, str) for text in turn)
        ):
            raise RowError("history is not [question, answer] pairs", raw.place)
    return [(question, answer) for question, answer in turns]


def history(raw: RawRow, attr: DatasetAttr) -> Conversation:
    """The messages column."""
    column = attr.columns.messages
    turns = raw.columns.get(column) if column else None
    if turns is None:
        if column in raw.columns:
            raise RowError("no messages", raw.place)
        raise DataError(
            f"{raw.place}: no column {column!r} with the messages; its columns are {', '.join(raw.columns)}. "
            "Name it in columns.messages"
        )
    if isinstance(turns, str) or not isinstance(turns, Sequence):
        raise DataError(f"{raw.place}: {column!r} should be a list of messages, not {type(turns).__name__}")
    return conversation(turns, raw, attr, raw.place)


def conversation(turns: Sequence[Any], raw: RawRow, attr: DatasetAttr, place: str) -> Conversation:
    """A list of messages with the row's system message and tools; `place` names it in errors."""
    if not turns:
        raise RowError("no messages", place)
    messages = [message(turn, f"{place}, message {i}", attr) for i, turn in enumerate(turns)]
    system = cell(raw, attr.columns.system)
    if messages[0].role == "system":
        if not messages[0].content:
            messages = messages[1:]
    elif system:
        messages = [Message("system", system), *messages]
    return Conversation(tuple(messages), _tools(raw, attr.columns.tools))


def message(turn: Any, place: str, attr: DatasetAttr) -> Message:
    """One message; `place` names it in errors."""
    tags = attr.tags
    if not isinstance(turn, Mapping) or tags.role_tag not in turn:
        keys = ", ".join(turn) if isinstance(turn, Mapping) else type(turn).__name__
        raise DataError(
            f"{place}: no {tags.role_tag!r} in it (it has {keys}); set tags.role_tag and tags.content_tag"
        )
    role = {
        tags.user_tag: "user",
        tags.assistant_tag: "assistant",
        tags.observation_tag: "tool",
        tags.function_tag: "function",
        tags.system_tag: "system",
    }.get(str(turn[tags.role_tag]))
    if role is None:
        named = repr(turn[tags.role_tag])[:40]
        raise RowError(f"unknown role {named}", f"{place}; set tags if it is meant to be one")
    content = turn.get(tags.content_tag)
    calls = _tool_calls(turn.get("tool_calls") or [], place)
    if role == "function" and not calls:
        calls, content = _tool_calls(_json(content, place), place), ""
    if content is None and calls:
        content = ""
    content, media = content_parts(content, place)
    reasoning = turn.get("reasoning_content") or turn.get("reasoning")
    if reasoning is not None and not isinstance(reasoning, str):
        raise RowError("reasoning is not text", place)
    role = "assistant" if role == "function" else role
    return Message(role, content, reasoning, calls, _weight(turn.get("weight"), role, place), media=media)


def _weight(weight: Any, role: str, place: str) -> float | None:
    if weight is None:
        return None
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight < 0:
        raise DataError(f"{place}: weight should be a number of 0 or more, not {weight!r}")
    if role != "assistant" and weight > 0:
        raise DataError(f"{place}: a weight belongs to an assistant's message; this one is a {role}'s")
    return float(weight)


def _json(text: Any, place: str) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RowError("tool call is not JSON", f"{place}: {error.msg}") from error


def _tool_calls(calls: Any, place: str) -> tuple[ToolCall, ...]:
    """One call or a list: {name, arguments}, or OpenAI's {id, type, function: {name, arguments}}."""
    found = []
    for call in [calls] if isinstance(calls, Mapping) else calls:
        body = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(body, Mapping) or not isinstance(body.get("name"), str):
            raise RowError("tool call without a name", place)
        arguments = body.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _object_or_text(arguments)
        if not isinstance(arguments, Mapping | str):
            raise RowError("tool call arguments are no object", place)
        found.append(ToolCall(body["name"], arguments, call.get("id")))
    return tuple(found)


def _object_or_text(text: str) -> Mapping[str, Any] | str:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return value if isinstance(value, dict) else text


def _tools(raw: RawRow, column: str | None) -> tuple[Mapping[str, Any], ...]:
    """Tool descriptions in the form that chat templates expect: {type: function, function: {...}}."""
    value = raw.columns.get(column) if column else None
    if not value:
        return ()
    tools = _json(value, f"{raw.place}, {column}") if isinstance(value, str) else value
    tools = [tools] if isinstance(tools, Mapping) else tools
    if not _are_objects(tools):
        raise RowError("tools are not a list of objects", raw.place)
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def _are_objects(values: Any) -> bool:
    return (
        isinstance(values, Iterable)
        and not isinstance(values, str)
        and all(isinstance(v, Mapping) for v in values)
    )


def cell(raw: RawRow, column: str | None, *, required: bool = False) -> str:
    """A text column; "" where it is empty or, unless required, absent."""
    if column is None:
        return ""
    if required and column not in raw.columns:
        raise DataError(
            f"{raw.place}: no column {column!r}; its columns are {', '.join(raw.columns)}. "
            "Name the right one in columns.prompt, or set formatting"
        )
    value = raw.columns.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError(f"{column} is not text", f"{raw.place}: {type(value).__name__}")
    return value
