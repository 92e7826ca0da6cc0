"""The marks of reasoning and tool calls are learnt from the template, and read back what it writes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, strategies as st

from luthier.data.answer_form import AnswerForm, Spoken, SpokenStream
from luthier.types import Conversation, Message, ToolCall
from tests.templates_with_tools import BARE, HERMES, LIST, OPENED, TEXT, template_with
from tests.tiny import CHATML

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALLS = (ToolCall("look", {"place": "Rom {é}"}, "abcdefghi"), ToolCall("look", {}, "ihgfedcba"))
FORMS = {
    name: AnswerForm.of(template_with(source))
    for name, source in {
        "hermes": HERMES,
        "list": LIST,
        "bare": BARE,
        "text": TEXT,
        "opened": OPENED,
        "chatml": CHATML,
    }.items()
}
SOURCES = {"hermes": HERMES, "list": LIST, "bare": BARE}


def written(source: str, answer: Message) -> str:
    """The text of an answer as the template writes it."""
    template = template_with(source)
    encoded = template.encode(Conversation((Message("user", "Go"), answer), (TOOL,)))
    span = encoded.answers[-1]
    return template.decode(encoded.input_ids[span.start : span.stop - 1])


def named(spoken: Spoken) -> list[tuple[str, object]]:
    return [(call.name, call.arguments) for call in spoken.calls]


def test_the_marks_of_a_template() -> None:
    marks = {name: form.marks for name, form in FORMS.items()}
    assert marks == {
        "hermes": ("<think>", "</think>", "<tool_call>", "</tool_call>"),
        "list": ("[TOOL_CALLS]",),
        "bare": (),
        "text": (),
        "opened": ("</think>",),
        "chatml": (),
    }
    keys = {name: (form.call.name, form.call.arguments) for name, form in FORMS.items() if form.call}
    assert keys == {
        "hermes": ("name", "arguments"),
        "list": ("name", "arguments"),
        "bare": ("name", "parameters"),
    }
    assert "no place for tools" in FORMS["chatml"].no_calls
    assert "a form that is not read back" in FORMS["text"].no_calls
    assert "no place for tool calls" in FORMS["opened"].no_calls


@pytest.mark.parametrize(
    ("name", "calls"),
    [("hermes", CALLS[:1]), ("hermes", CALLS), ("list", CALLS[:1]), ("list", CALLS), ("bare", CALLS[:1])],
)
def test_calls_are_read_back(name: str, calls: tuple[ToolCall, ...]) -> None:
    text = written(SOURCES[name], Message("assistant", tool_calls=calls))
    spoken = FORMS[name].read(text, tools=("look",))
    assert named(spoken) == [(call.name, call.arguments) for call in calls] and spoken.content == ""


def test_reasoning_content_and_calls_stand_apart() -> None:
    answer = Message("assistant", "I look.", "Where is it?\nIn Rome.", CALLS)
    spoken = FORMS["hermes"].read(written(HERMES, answer), tools=("look",))
    assert (spoken.reasoning, spoken.content) == ("Where is it?\nIn Rome.", "I look.")
    assert named(spoken) == [(call.name, call.arguments) for call in CALLS]
    whole = FORMS["hermes"].read(written(HERMES, answer))  # no tools were offered
    assert whole.calls == () and whole.content.startswith("I look.\n<tool_call>")


def test_reasoning_that_the_prompt_begins() -> None:
    form = FORMS["opened"]
    assert form.read("so\n</think>\n\nYes.") == Spoken("Yes.", "so")
    assert form.read("so it goes") == Spoken("", "so it goes")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", 'a <tool_call>{"name": "look", "arguments": {"place": "R'),
        ("hermes", "<tool_call>look(Rome)</tool_call>"),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "look", "arguments": 3}</tool_call>'),
        ("list", "[TOOL_CALLS] []"),
        ("bare", '{"name": "other", "parameters": {}}'),
        ("bare", '{"name": "look", "parameters": {}} and more'),
        ("bare", '{"a": 1}'),
        ("hermes", "<tool_call>" + "[" * 100_000),
    ],
)
def test_what_is_no_call_stays_text(name: str, text: str) -> None:
    assert FORMS[name].read(text, tools=("look",)) == Spoken(text)


def test_arguments_as_text_and_words_after_a_call() -> None:
    inner = json.dumps({"place": "Rome"})
    text = f'Well. <tool_call>{{"name": "look", "arguments": {json.dumps(inner)}}}</tool_call> So.'
    spoken = FORMS["hermes"].read(text, tools=("look",))
    assert named(spoken) == [("look", {"place": "Rome"})] and spoken.content == "Well.\nSo."


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "answer"),
    [
        ("Yes.", False, "", "Yes."),
        ("<think>\nhm\n</think>\n\nYes.", False, "hm", "Yes."),
        ("\n<think>hm</think>Yes.", False, "hm", "Yes."),
        ("hm\n</think>\n\nYes.", True, "hm", "Yes."),
        ("hm and more", True, "hm and more", ""),
        ("<think>hm", False, "hm", ""),
        ("<think></think>Yes.", False, "", "Yes."),
        ("<think>a < b</think>a<b", False, "a < b", "a<b"),
        ("<think>hm</think>Say </think>.", False, "hm", "Say </think>."),
        ("Say <think>hm</think>", False, "", "Say <think>hm</think>"),
        ("<thin", False, "", "<thin"),
        ("  spaces stay ", False, "", "  spaces stay "),
        ("<think>\n a \n</think>\n\n  spaces stay", False, " a ", "  spaces stay"),
    ],
)
@pytest.mark.parametrize("name", ["chatml", "hermes"])
def test_the_answer_to_a_prompt_that_may_begin_the_reasoning(
    name: str, text: str, opened: bool, reasoning: str, answer: str
) -> None:
    form = FORMS[name].after("<|im_start|>assistant\n" + ("<think>\n" if opened else ""))
    assert form.read(text) == Spoken(answer, reasoning)


def test_marks_that_are_learnt_come_before_those_that_models_write() -> None:
    form = AnswerForm("[THINK]", "[/THINK]")
    assert form.after("assistant") == form
    assert form.after("assistant[THINK]\n") == AnswerForm("", "[/THINK]")
    assert form.after("assistant<think>") == form
    assert FORMS["opened"].after("<|im_start|>assistant\n<think>\n") == FORMS["opened"]


MARKS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "<",
    "think",
    " ",
    "\n",
    "{",
    "}",
)
CALLED = ('{"name": "look", "arguments": {}}', '{"name": "look", "parameters": {"b": 1}}')
PIECES = st.lists(st.sampled_from([*MARKS, *CALLED, "a", "é"]), max_size=10)


@given(st.sampled_from(sorted(FORMS)), PIECES, st.booleans())
def test_what_is_shown_early_is_never_taken_back(name: str, pieces: list[str], tools: bool) -> None:
    form, text, names = FORMS[name], "".join(pieces), ("look",) if tools else ()
    whole = form.read(text, tools=names)
    before = Spoken("")
    for size in range(len(text) + 1):
        now = form.read(text[:size], tools=names, ended=False)
        assert not now.calls
        assert now.content.startswith(before.content) and now.reasoning.startswith(before.reasoning)
        before = now
    assert whole.content.startswith(before.content) and whole.reasoning.startswith(before.reasoning)


@given(st.sampled_from(sorted(FORMS)), PIECES, st.booleans(), st.data())
def test_pieces_put_together_are_the_parts(
    name: str, pieces: list[str], opened: bool, data: st.DataObject
) -> None:
    form, text = FORMS[name].after("<think>" if opened else ""), "".join(pieces)
    stream, content, reasoning, rest = SpokenStream(form, ("look",)), "", "", text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        added = stream.push(rest[:size])
        content, reasoning, rest = content + added.content, reasoning + added.reasoning, rest[size:]
    added = stream.push("", ended=True)
    whole = form.read(text, tools=("look",))
    assert Spoken(content + added.content, reasoning + added.reasoning, added.calls) == whole == stream.spoken
