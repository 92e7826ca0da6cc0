"""Columns of a raw row -> messages and tools, in alpaca's and in sharegpt's or OpenAI's form.

    asked(raw, attr)                     alpaca: everything before the answer
    history(raw, attr)                   sharegpt, openai: the messages column
    conversation(turns, raw, attr, ...)  a list of messages wherever it stands
    cell(raw, column)                    one text

Raises `RowError` and `DataError` as `formats` says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from luthier.data.media import content_parts
from luthier.data.message_weights import message_weight, weighted_spans
from luthier.data.read import RawRow
from luthier.data.registry import DatasetAttr
from luthier.recipe.schema import TagSpec
from luthier.types import Conversation, DataError, Message, RowError, ToolCall

_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
"""Reasoning before a sharegpt row's call."""


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
    roles, tags = _roles(attr.tags), attr.tags
    messages = [
        _plain(turn, tags, roles) or message(turn, f"{place}, message {i}", attr)
        for i, turn in enumerate(turns)
    ]
    system = cell(raw, attr.columns.system)
    if messages[0].role == "system":
        if not messages[0].content:
            messages = messages[1:]
    elif system:
        messages = [Message("system", system), *messages]
    return Conversation(tuple(messages), _tools(raw, attr.columns.tools))


def _roles(tags: TagSpec) -> dict[str, str]:
    return {
        tags.user_tag: "user",
        tags.assistant_tag: "assistant",
        tags.observation_tag: "tool",
        tags.function_tag: "function",
        tags.system_tag: "system",
    }


def _plain(turn: Any, tags: TagSpec, roles: Mapping[str, str]) -> Message | None:
    """A message that is a role and a text and nothing else, as most are; None for others, which `message` reads."""
    if type(turn) is not dict or len(turn) != 2:
        return None
    said, content = turn.get(tags.role_tag), turn.get(tags.content_tag)
    role = roles.get(said) if type(said) is str else None
    return Message(role, content) if role and role != "function" and type(content) is str else None


def message(turn: Any, place: str, attr: DatasetAttr) -> Message:
    """One message; `place` names it in errors."""
    tags = attr.tags
    if not isinstance(turn, Mapping) or tags.role_tag not in turn:
        keys = ", ".join(turn) if isinstance(turn, Mapping) else type(turn).__name__
        raise DataError(
            f"{place}: no {tags.role_tag!r} in it (it has {keys}); set tags.role_tag and tags.content_tag"
        )
    role = _roles(tags).get(str(turn[tags.role_tag]))
    if role is None:
        named = repr(turn[tags.role_tag])[:40]
        raise RowError(f"unknown role {named}", f"{place}; set tags if it is meant to be one")
    content = turn.get(tags.content_tag)
    reasoning = turn.get("reasoning_content") or turn.get("reasoning")
    calls = _tool_calls(_json(turn.get("tool_calls") or [], place), place)
    if role == "function" and not calls:
        if isinstance(content, str) and not reasoning and (thought := _THOUGHT.match(content)):
            reasoning, content = thought[1].strip("\n"), content[thought.end() :]
        calls, content = _tool_calls(_json(content, place), place), ""
        if not calls:
            raise RowError("no tool call in a message of role function", place)
    if role == "tool" and not isinstance(content, str) and not _are_parts(content):
        content = json.dumps(content, ensure_ascii=False)
    if content is None and calls:
        content = ""
    content, media = content_parts(content, place)
    if reasoning is not None and not isinstance(reasoning, str):
        raise RowError("reasoning is not text", place)
    role = "assistant" if role == "function" else role
    weight, spans = message_weight(turn, place), weighted_spans(turn, content, place)
    if role != "tool":
        return Message(role, content, reasoning, calls, weight, spans, media)
    name, call_id = (_text_or_none(turn.get(key), key, place) for key in ("name", "tool_call_id"))
    return Message(role, content, reasoning, calls, weight, spans, media, name, call_id)


def _text_or_none(value: Any, key: str, place: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise RowError(f"{key} is not text", place)
    return value


def _are_parts(content: Any) -> bool:
    """Whether it is OpenAI's list of parts."""
    return _are_objects(content) and not isinstance(content, Mapping) and all("type" in p for p in content)


def _json(text: Any, place: str, what: str = "tool call") -> Any:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RowError(f"{what} is not JSON", f"{place}: {error.msg}") from error


def _tool_calls(calls: Any, place: str) -> tuple[ToolCall, ...]:
    """One call or a list: {name, arguments}, or OpenAI's {id, type, function: {name, arguments}}."""
    found = []
    if not isinstance(calls, Sequence | Mapping) or isinstance(calls, str):
        raise RowError("tool call is no object", place)
    for call in [calls] if isinstance(calls, Mapping) else calls:
        body = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(body, Mapping) or not isinstance(body.get("name"), str):
            raise RowError("tool call without a name", place)
        arguments = {} if body.get("arguments") is None else body["arguments"]
        if isinstance(arguments, str):
            arguments = _object_or_text(arguments)
        if not isinstance(arguments, Mapping | str):
            raise RowError("tool call arguments are no object", place)
        found.append(
            ToolCall(body["name"], arguments, _text_or_none(call.get("id"), "a tool call's id", place))
        )
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
    return tools_in(value, raw.place) if value else ()


def tools_in(value: Any, place: str) -> tuple[Mapping[str, Any], ...]:
    """The same of JSON text or what it holds: one tool or a list, with or without their type. Raises RowError."""
    tools = _json(value, place, "the list of tools")
    tools = [tools] if isinstance(tools, Mapping) else tools
    if isinstance(tools, Sequence) and not isinstance(tools, str):
        tools = [_json(tool, place, "a tool") for tool in tools]
    if not _are_objects(tools):
        raise RowError("tools are not a list of objects", place)
    wrapped = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    if not all(
        isinstance(t["function"], Mapping) and isinstance(t["function"].get("name"), str) for t in wrapped
    ):
        raise RowError("a tool without a name", place)
    return tuple(wrapped)


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
