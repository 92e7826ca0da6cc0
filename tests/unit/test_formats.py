"""Raw rows -> conversations and texts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from luthier.data.formats import to_row
from luthier.data.read import RawRow
from luthier.data.registry import DEFAULT_COLUMNS, DEFAULT_TAGS, DatasetAttr, Formatting
from luthier.recipe.schema import ColumnSpec
from luthier.types import Conversation, DataError, Message, RowError, ToolCall


def attr(formatting: Formatting = "alpaca", **columns: str | None) -> DatasetAttr:
    return DatasetAttr(
        name="demo",
        load_from="file",
        path="demo.json",
        formatting=formatting,
        columns=DEFAULT_COLUMNS[formatting].model_copy(update=columns),
        tags=DEFAULT_TAGS[formatting],
        named=frozenset(columns),
    )


def read(columns: Mapping[str, Any], description: DatasetAttr) -> Conversation:
    row = to_row(RawRow(7, "demo.json, row 7", columns), description, "conversation")
    assert (row.source, row.index, row.text) == ("demo", 7, None)
    assert row.conversation is not None
    return row.conversation


def text(columns: Mapping[str, Any], description: DatasetAttr) -> str | None:
    return to_row(RawRow(7, "demo.json, row 7", columns), description, "text").text


def test_alpaca_joins_instruction_and_input_by_a_newline() -> None:
    assert read({"instruction": "Add", "input": "1 2", "output": "3"}, attr()).messages == (
        Message("user", "Add\n1 2"),
        Message("assistant", "3"),
    )
    for empty in ("", None):
        row = {"instruction": "Add", "input": empty, "output": "3"}
        assert read(row, attr()).messages[0] == Message("user", "Add")
    assert read({"instruction": "", "input": "x", "output": " 3 "}, attr()).messages == (
        Message("user", "x"),
        Message("assistant", " 3 "),
    )


def test_alpaca_history_and_system_come_first() -> None:
    row = {"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "s"}
    messages = read(row, attr(history="history", system="system")).messages
    assert [(m.role, m.content) for m in messages] == [
        ("system", "s"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "a"}, "no column 'output' with the answer"),
        ({"instruction": "a", "output": None}, "no answer"),
        ({"instruction": "a", "output": 3}, "answer is not text"),
        ({"instruction": ["a"], "output": "b"}, "instruction is not text"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, "history is not"),
    ],
)
def test_alpaca_rows_that_cannot_be_used(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as caught:
        read(row, attr(history="history"))
    assert caught.value.reason.startswith(reason)


def test_a_missing_prompt_column_is_the_files_fault() -> None:
    with pytest.raises(
        DataError, match=r"row 7: no column 'instruction'; its columns are question, output"
    ) as caught:
        read({"question": "a", "output": "b"}, attr())
    assert not isinstance(caught.value, RowError)


def test_sharegpt_roles_calls_and_tools() -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    tool = {"name": "add", "parameters": {}}
    row = {
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "1+1?"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "It is 2."},
        ],
        "tools": json.dumps([tool]),
    }
    conversation = read(row, attr("sharegpt", tools="tools"))
    assert conversation.messages == (
        Message("system", "s"),
        Message("user", "1+1?"),
        Message("assistant", "", tool_calls=(ToolCall("add", {"a": 1}),)),
        Message("tool", "2"),
        Message("assistant", "It is 2."),
    )
    assert conversation.tools == ({"type": "function", "function": tool},)


def test_sharegpt_several_calls_at_once() -> None:
    calls = [{"name": "a", "arguments": '{"x": 1}'}, {"name": "b", "arguments": "free text"}]
    row = {"conversations": [{"from": "function_call", "value": json.dumps(calls)}]}
    assert read(row, attr("sharegpt")).messages[0].tool_calls == (
        ToolCall("a", {"x": 1}),
        ToolCall("b", "free text"),
    )


def test_the_system_message_wins_over_the_system_column() -> None:
    description = attr("sharegpt", system="system")
    turns = [{"from": "human", "value": "q"}]
    column_only = read({"conversations": turns, "system": "column"}, description)
    both = read(
        {"conversations": [{"from": "system", "value": "own"}, *turns], "system": "column"}, description
    )
    empty = read({"conversations": [{"from": "system", "value": ""}, *turns]}, description)
    assert [m.content for m in column_only.messages] == ["column", "q"]
    assert [m.content for m in both.messages] == ["own", "q"]
    assert [m.content for m in empty.messages] == ["q"]


def test_openai_messages_keep_content_and_calls_together() -> None:
    function = {"name": "add", "arguments": '{"a": 1}'}
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "+1?"}]},
            {
                "role": "assistant",
                "content": "Let me see.",
                "reasoning_content": "simple",
                "tool_calls": [{"id": "c1", "type": "function", "function": function}],
                "weight": 0,
            },
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": None, "tool_calls": [{"function": function}]},
        ]
    }
    assert read(row, attr("openai")).messages == (
        Message("user", "1+1?"),
        Message("assistant", "Let me see.", "simple", (ToolCall("add", {"a": 1}, "c1"),), weight=0.0),
        Message("tool", "2"),
        Message("assistant", "", tool_calls=(ToolCall("add", {"a": 1}),)),
    )


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([{"role": "narrator", "content": "x"}], "unknown role 'narrator'"),
        ([{"role": ["a", "list"], "content": "x"}], "unknown role ['a', 'list']"),
        ([{"role": "user", "content": "half \ud83d of it"}], "text holds half of a surrogate pair"),
        (
            [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": "\udc00"}}]}],
            "text holds half of a surrogate pair",
        ),
        ([], "no messages"),
        (None, "no messages"),
        ([{"role": "user", "content": None}], "content is not text"),
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            "images of the row and their places in its text differ in number",
        ),
        ([{"role": "function", "content": "add(1)"}], "tool call is not JSON"),
        ([{"role": "assistant", "tool_calls": [{"id": "x"}]}], "tool call without a name"),
    ],
)
def test_message_rows_that_cannot_be_used(turns: Any, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        read({"messages": turns}, attr("openai"))
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chat": []}, "no column 'messages' with the messages; its columns are chat"),
        ({"messages": "hello"}, "'messages' should be a list of messages, not str"),
        (
            {"messages": [{"from": "human", "value": "x"}]},
            r"message 0: no 'role' in it \(it has from, value\)",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "weight": float("nan")}]},
            "message 0: weight should be a number of 0 or more, not nan",
        ),
        ({"messages": [{"role": "assistant", "content": "x", "weight": -1}]}, "weight should be a number"),
    ],
)
def test_message_files_that_are_not_what_they_say(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(row, attr("openai"))
    assert not isinstance(caught.value, RowError)


def test_text_comes_from_the_prompt_column_unchanged() -> None:
    description = replace(attr(), columns=ColumnSpec(prompt="body"), named=frozenset({"prompt"}))
    assert text({"body": " a\n", "text": "no"}, description) == " a\n"
    assert text({"text": " a\n"}, attr()) == " a\n"
    assert text({"instruction": "a", "input": "b", "output": "c"}, attr()) == "a\nb"
    assert (
        text(
            {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]},
            attr("openai"),
        )
        == "q"
    )
    with pytest.raises(DataError, match="no column 'body'"):
        text({"text": "x"}, description)
