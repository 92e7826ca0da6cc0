"""Every tool format is read back as it was written: whole, in pieces, and where it is broken."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from luthier.data import families, tool_formats
from luthier.data.answer_form import AnswerForm, Spoken, SpokenStream
from luthier.data.template import ChatTemplate, load_template
from luthier.recipe.schema import DataSpec
from luthier.types import Conversation, DataError, Message, RowError, ToolCall
from tests.templates_with_tools import template_with
from tests.tiny import chat_tokenizer

ONE_CALL = {"glm4"}
CALLS_ALONE = {"llama3"}
TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
NEVER = ("</arg_value>", "</parameter>", '<|"|>')
"""Marks that end a value in the formats that write strings bare: they cannot carry them."""


@cache
def template(name: str) -> ChatTemplate:
    return template_with(tool_formats.with_tools(families.find("chatml").layout, name))


@cache
def form(name: str) -> AnswerForm:
    return AnswerForm.of(template(name))


def answer_text(name: str, message: Message, tools: tuple[Any, ...]) -> str:
    """The text of an answer, from the rendering alone."""
    text = template(name).rendering(Conversation((Message("user", "Q"), message), tools))
    return text.rpartition("<|im_start|>assistant\n")[2].removesuffix("<|im_end|>\n")


PIECES = (
    "a",
    "é",
    "中",
    "😀",
    " ",
    "\n",
    '"',
    "'",
    "\\",
    "<",
    ">",
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "=",
    "null",
    "3",
    "\t",
)
WORDS = st.lists(
    st.sampled_from([*PIECES, "<tool_call>", "</tool_call>", "Action: x", "</function>"]), max_size=8
)
TEXTS = WORDS.map("".join).filter(lambda text: not any(mark in text for mark in NEVER))
NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
LEAVES = (
    TEXTS | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False) | st.booleans()
)
VALUES = st.recursive(
    LEAVES | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(NAMES, VALUES.filter(lambda value: value is not None), max_size=4)
CALLS = st.lists(st.tuples(NAMES, ARGUMENTS), min_size=1, max_size=3, unique_by=lambda call: call[0])
CONTENT = st.sampled_from(["", "I look.", "Zwei\nZeilen, 中", "3 < 4 [ok] {no}"])


def schemas(calls: list[tuple[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "type": "object",
            "properties": {key: {"type": TYPES[type(v)]} for key, v in arguments.items()},
        }
        for name, arguments in calls
    }


@pytest.mark.parametrize("name", tool_formats.names())
@settings(max_examples=15, deadline=None)
@given(calls=CALLS, content=CONTENT, data=st.data())
def test_what_is_written_is_read_back(
    name: str, calls: list[tuple[str, dict[str, Any]]], content: str, data: st.DataObject
) -> None:
    """Not carried: a bare string with the mark that ends it (`NEVER`), several calls where the format has one, content
    beside calls in Llama's, and null as an argument in the bare formats (a schema would have to name it)."""
    calls = calls[:1] if name in ONE_CALL else calls
    content = "" if name in CALLS_ALONE else content
    offered = schemas(calls)
    tools = tuple(
        {"type": "function", "function": {"name": tool, "description": "d", "parameters": schema}}
        for tool, schema in offered.items()
    )
    made = tuple(ToolCall(tool, arguments) for tool, arguments in calls)
    text = answer_text(name, Message("assistant", content, None, made), tools)
    whole = form(name).read(text, tools=offered)
    assert whole.content == content
    assert [(call.name, call.arguments) for call in whole.calls] == calls

    stream, said, rest = SpokenStream(form(name), offered), "", text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        said, rest = said + stream.push(rest[:size]).content, rest[size:]
        assert content.startswith(said)
    last = stream.push("", ended=True)
    assert (said + last.content, last.calls) == (content, whole.calls)


BROKEN = st.lists(
    st.sampled_from(
        [
            *(
                "<tool_call>",
                "</tool_call>",
                "<function=look>",
                "</function>",
                "<parameter=a>",
                "</parameter>",
            ),
            *(
                "<arg_key>a</arg_key>",
                "<arg_value>",
                "</arg_value>",
                "<seed:tool_call>",
                "<minimax:tool_call>",
            ),
            *(
                '<invoke name="look">',
                "</invoke>",
                "<tool_calls>",
                "[TOOL_CALLS]",
                "Action:",
                "Action Input:",
            ),
            *(
                "<｜tool▁calls▁begin｜>",
                "<｜tool▁call▁begin｜>",
                "<｜tool▁sep｜>",
                "<|tool_call_start|>",
                "[look(a=1)]",
            ),
            *(
                "<|tool_call>",
                "call:look",
                "look",
                "\n",
                " ",
                '{"a": 1}',
                '{"name": "look", "arguments": {}}',
                "{",
                "x",
            ),
            *(
                "<|channel|>",
                "analysis",
                "final",
                "commentary",
                "<|message|>",
                "<|end|>",
                "<|start|>assistant",
            ),
            *(" to=functions.look", "<|start|>", "<|call|>"),
        ]
    ),
    max_size=9,
).map("".join)
FORMS = [*tool_formats.names(), "harmony"]


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=25, deadline=None)
@given(text=BROKEN)
def test_what_is_shown_early_is_never_taken_back(name: str, text: str) -> None:
    read = AnswerForm(channels=True) if name == "harmony" else form(name)
    before = Spoken("")
    whole = read.read(text, tools=("look",))
    for size in range(len(text) + 1):
        now = read.read(text[:size], tools=("look",), ended=False)
        assert not now.calls
        assert now.content.startswith(before.content) and now.reasoning.startswith(before.reasoning)
        before = now
    assert whole.content.startswith(before.content) and whole.reasoning.startswith(before.reasoning)
    if not whole.calls and name != "harmony":
        assert whole.content == text


def test_harmony_has_reasoning_words_and_calls() -> None:
    read = AnswerForm(channels=True).read
    text = (
        "<|channel|>analysis<|message|>Where?<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        '<|start|>assistant<|channel|>commentary to=functions.look <|constrain|>json<|message|>{"place": "Rom"}<|call|>'
        "<|start|>assistant to=functions.stop<|channel|>commentary json<|message|>{}"
    )
    spoken = read(text, tools=("look", "stop"))
    assert (spoken.reasoning, spoken.content) == ("Where?", "I look.")
    assert [(c.name, c.arguments) for c in spoken.calls] == [("look", {"place": "Rom"}), ("stop", {})]
    assert read("<|channel|>final<|message|>Yes.<|return|>") == Spoken("Yes.")
    broken = read("<|channel|>commentary to=functions.look<|message|>{no", tools=("look",))
    assert broken.calls == () and broken.content.endswith("to=functions.look<|message|>{no")


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "3", "3"),
        ({"type": "integer"}, "3", 3),
        ({"type": "integer"}, "three", "three"),
        ({}, "3", 3),
        ({}, "3 o'clock", "3 o'clock"),
        ({}, '"3"', '"3"'),
        ({"type": ["string", "null"]}, "null", None),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "3", 3),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "[3]", "[3]"),
        ({"enum": ["3", "4"]}, "3", "3"),
        ({"type": "number"}, "1.5", 1.5),
        ({"type": "boolean"}, "True", True),
        ({}, "True", "True"),
        ({"type": "object"}, '{"a": [true]}', {"a": [True]}),
    ],
)
def test_bare_arguments_are_typed_by_the_schema(schema: dict[str, Any], text: str, value: Any) -> None:
    tools = {"look": {"type": "object", "properties": {"a": schema}}}
    written = f"<tool_call>look\n<arg_key>a</arg_key>\n<arg_value>{text}</arg_value>\n</tool_call>"
    (call,) = form("glm4_moe").read(written, tools=tools).calls
    assert call.arguments == {"a": value} and type(call.arguments["a"]) is type(value)


def test_python_calls_with_names_that_python_keeps() -> None:
    text = '<|tool_call_start|>[go(from="A", to="B", x=[true, None, {"in=": -1}])]<|tool_call_end|>Wait.'
    spoken = form("lfm2").read(text, tools=("go",))
    assert [(c.name, c.arguments) for c in spoken.calls] == [
        ("go", {"from": "A", "to": "B", "x": [True, None, {"in=": -1}]})
    ]
    assert spoken.content == "Wait."
    for harmful in ("[open('x')]", "[go(a=open('x'))]", "[go(1)]", "[" * 5000, "[go(a=b'x')]", "\0"):
        broken = f"<|tool_call_start|>{harmful}<|tool_call_end|>"
        assert form("lfm2").read(broken, tools=("go",)) == Spoken(broken)


def test_a_format_needs_a_place() -> None:
    with pytest.raises(
        DataError, match=r"data.tool_format='qwen': the tokenizer's own chat template has no place"
    ):
        load_template(chat_tokenizer(), DataSpec(tool_format="qwen"))
    with pytest.raises(DataError, match="there is no tool format 'qwn'; did you mean qwen"):
        load_template(chat_tokenizer(), DataSpec(template="chatml", tool_format="qwn"))


def test_the_recipes_format_is_saved_with_the_model() -> None:
    tokenizer = chat_tokenizer()
    own = load_template(tokenizer, DataSpec(template="chatml"))
    assert "Action Input: " in own.source
    chosen = load_template(tokenizer, DataSpec(template="chatml", tool_format="glm4_moe"))
    assert tokenizer.chat_template == chosen.source and "<arg_key>" in chosen.source
    assert "place of" not in chosen.source and chosen.fingerprint != own.fingerprint


def test_results_of_one_turn() -> None:
    calls = (ToolCall("a", {}), ToolCall("b", {}))
    messages = (
        Message("user", "Q"),
        Message("assistant", "", None, calls),
        Message("tool", "1", name="a", tool_call_id="x"),
        Message("tool", "2"),
        Message("assistant", "A"),
    )
    shown = template("qwen").rendering(Conversation(messages))
    assert shown.endswith(
        "</tool_call><|im_end|>\n<|im_start|>tool\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n"
        "</tool_response><|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    )
    apart = template("default").rendering(Conversation(messages))
    assert "<|im_start|>tool\n1<|im_end|>\n<|im_start|>tool\n2<|im_end|>\n" in apart


def test_what_a_format_cannot_say_drops_the_row() -> None:
    two = (ToolCall("a", {}), ToolCall("b", {}))
    for name, message, why in (
        ("glm4", Message("assistant", "", None, two), "takes one call"),
        ("llama3", Message("assistant", "Hm", None, two), "without content"),
        (
            "qwen3_5",
            Message("assistant", "", None, (ToolCall("a", "x"),)),
            "arguments that are a JSON object",
        ),
    ):
        with pytest.raises(RowError, match=why):
            template(name).encode(Conversation((Message("user", "Q"), message)))
