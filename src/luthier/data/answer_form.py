"""What of an answer is reasoning, what is text and what are tool calls, as the template itself writes them.

    AnswerForm.of(template)            learnt by rendering an answer whose parts are known
    form.after(prompt)                 the same for the answer to a prompt, which may begin the reasoning itself
    form.read(text, tools=, ended=)    an answer, or the beginning of one -> its parts
    SpokenStream(form)                 an answer in pieces -> what each adds to the parts

Nothing is known of families here: the marks around reasoning and calls, and the keys of a call's JSON, are those
that the template puts around the parts of a made-up answer. A template that writes calls in another form than JSON has
no call form, and says why.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from luthier.data.template import ChatTemplate
from luthier.types import Conversation, DataError, Message, ToolCall

THINK = ("<think>", "</think>")
"""What models write around reasoning by themselves."""
_WHY, _SAID, _NAME = "Because-so-it-is", "Thus-it-is-said", "made_up_tool"
_ARGUMENTS = {"made_up_key": "made up value"}
_ID = "a1b2c3d4e"
"""Nine letters and digits, which is what Mistral's templates take."""
_TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "Made up.",
        "parameters": {
            "type": "object",
            "properties": {"made_up_key": {"type": "string", "description": "Made up."}},
            "required": ["made_up_key"],
        },
    },
}


@dataclass(frozen=True, slots=True)
class Spoken:
    """The parts of an answer."""

    content: str
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class CallForm:
    """JSON between `opens` and `closes` (either may be empty), with the keys of a call's name and arguments."""

    opens: str
    closes: str
    name: str
    arguments: str

    def calls(self, value: Any) -> list[ToolCall] | None:
        """The calls of a JSON value; None where it is none."""
        items = value if isinstance(value, list) else [value]
        found = [self._call(item) for item in items]
        return [call for call in found if call is not None] if found and None not in found else None

    def _call(self, item: Any) -> ToolCall | None:
        body = _body(item)
        name, arguments = body.get(self.name), body.get(self.arguments, {})
        if isinstance(arguments, str):
            arguments = _json_or_none(arguments)
        if not isinstance(name, str) or not isinstance(arguments, Mapping):
            return None
        return ToolCall(name, arguments)


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """The marks of a template. Empty `reason_closes`: it marks no reasoning. `reason_opens` is empty where the prompt
    begins the reasoning. `no_calls` says why there is no call form."""

    reason_opens: str = ""
    reason_closes: str = ""
    call: CallForm | None = None
    no_calls: str = ""

    @staticmethod
    def of(template: ChatTemplate) -> AnswerForm:
        """What the template's own rendering tells."""
        opens, closes = _reasoning_marks(template)
        try:
            call = _call_form(template, closes)
        except DataError as error:
            return AnswerForm(opens, closes, None, str(error))
        why = (
            ""
            if call
            else "the chat template writes tool calls in a form other than JSON, which is not read back"
        )
        return AnswerForm(opens, closes, call, why)

    def after(self, prompt: str) -> AnswerForm:
        """The form of the answer to a prompt, of which the end is enough.

        `THINK` where the template marks no reasoning; no opening mark where the prompt ends with it.
        """
        form = self if self.reason_closes else replace(self, reason_opens=THINK[0], reason_closes=THINK[1])
        opened = form.reason_opens and prompt.rstrip().endswith(form.reason_opens)
        return replace(form, reason_opens="") if opened else form

    @property
    def marks(self) -> tuple[str, ...]:
        """The marks, which belong to an answer's text even where they are special tokens."""
        calls = (self.call.opens, self.call.closes) if self.call else ()
        return tuple(mark for mark in (self.reason_opens, self.reason_closes, *calls) if mark)

    def read(self, text: str, *, tools: Sequence[str] = (), ended: bool = True) -> Spoken:
        """The parts of an answer's text. tools: names of those that it may call; without any, nothing is a call.

        With `ended` false the text goes on, and only what cannot change any more is returned: each part of the
        beginning is a prefix of that of the whole.
        """
        reasoning, rest = self._reasoning(text, ended)
        if not tools or self.call is None:
            return Spoken(rest, reasoning)
        content, calls = self._called(self.call, rest, tools, ended)
        return Spoken(content, reasoning, calls)

    def _reasoning(self, text: str, ended: bool) -> tuple[str, str]:
        opens, closes = self.reason_opens, self.reason_closes
        if not closes:
            return "", text
        body = text
        if opens:
            lead = text.lstrip()
            if not lead.startswith(opens):
                undecided = not ended and opens.startswith(lead)
                return "", "" if undecided else text
            body = lead[len(opens) :]
        before, closed, after = body.partition(closes)
        if not closed and not ended:
            before = _certain(before, closes)
        # Only the newlines around marks are the template's: an answer may begin with an indented line.
        return before.strip("\n"), after.lstrip("\n")

    def _called(
        self, form: CallForm, text: str, tools: Sequence[str], ended: bool
    ) -> tuple[str, tuple[ToolCall, ...]]:
        if not form.opens:
            return _bare_calls(form, text, tools, ended)
        at = text.find(form.opens)
        if at < 0:
            return (text if ended else _certain(text, form.opens).rstrip()), ()
        content = text[:at].rstrip()
        if not ended:
            return content, ()
        found = _marked_calls(form, text[at:])
        if found is None:
            return text, ()
        calls, rest = found
        return "\n".join(part for part in (content, rest) if part), calls


class SpokenStream:
    """The parts of an answer that comes in pieces; `spoken` is all of them so far."""

    def __init__(self, form: AnswerForm, tools: Sequence[str] = ()) -> None:
        self._form, self._tools = form, tools
        self._text = ""
        self.spoken = Spoken("")

    def push(self, piece: str, *, ended: bool = False) -> Spoken:
        """What a piece adds: put together, the parts of the whole. Calls are complete and come with the end."""
        self._text += piece
        before, self.spoken = self.spoken, self._form.read(self._text, tools=self._tools, ended=ended)
        return Spoken(
            self.spoken.content[len(before.content) :],
            self.spoken.reasoning[len(before.reasoning) :],
            self.spoken.calls,
        )


# --------------------------------------------------------------------------------------------------
# Learning


def _reasoning_marks(template: ChatTemplate) -> tuple[str, str]:
    """What stands before and after reasoning; empty where the template marks none."""
    try:
        text = _answer_text(template, Message("assistant", _SAID, reasoning=_WHY))
    except DataError:
        return "", ""
    before, found, rest = text.partition(_WHY)
    between, said, _ = rest.partition(_SAID)
    return (before.strip(), between.strip()) if found and said else ("", "")


def _call_form(template: ChatTemplate, reason_closes: str) -> CallForm | None:
    """Raises DataError for a template that has no place for tools or calls."""
    call = ToolCall(_NAME, _ARGUMENTS, _ID)
    text = _answer_text(template, Message("assistant", tool_calls=(call,)), (_TOOL,))
    for start, character in enumerate(text):
        if character not in "[{":
            continue
        try:
            value, length = json.JSONDecoder().raw_decode(text[start:])
        except ValueError:
            continue
        keys = _keys(value)
        if keys is not None:
            before = text[:start]
            if reason_closes:
                before = before.rpartition(reason_closes)[2]
            return CallForm(before.strip(), text[start + length :].strip(), *keys)
    return None


def _answer_text(template: ChatTemplate, answer: Message, tools: tuple[Mapping[str, Any], ...] = ()) -> str:
    """What the model would have to write for this answer, without what ends it."""
    encoded = template.encode(Conversation((Message("user", "How?"), answer), tools))
    span = encoded.answers[-1]
    ids = encoded.input_ids[span.start : span.stop]
    while ids and ids[-1] in template.stop_ids:
        ids = ids[:-1]
    return template.decode(ids)


def _keys(value: Any) -> tuple[str, str] | None:
    """The keys of name and arguments in the made-up call."""
    body = _body(value[0] if isinstance(value, list) and value else value)
    named = [key for key, item in body.items() if item == _NAME]
    given = [
        key
        for key, item in body.items()
        if item == _ARGUMENTS or (isinstance(item, str) and _json_or_none(item) == _ARGUMENTS)
    ]
    return (named[0], given[0]) if named and given else None


def _body(item: Any) -> Mapping[str, Any]:
    """{name, arguments}, or what {type: function, function: {...}} holds."""
    if not isinstance(item, Mapping):
        return {}
    inner = item.get("function")
    return inner if isinstance(inner, Mapping) else item


# --------------------------------------------------------------------------------------------------
# Reading


def _certain(text: str, mark: str) -> str:
    """The text without an end that may be the beginning of a mark."""
    size = next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
    return text[: len(text) - size]


def _marked_calls(form: CallForm, text: str) -> tuple[tuple[ToolCall, ...], str] | None:
    """The calls at the beginning of a text and what follows them; None where it is not what the template writes."""
    calls: list[ToolCall] = []
    while text.startswith(form.opens):
        text = text[len(form.opens) :].lstrip()
        try:
            value, length = json.JSONDecoder().raw_decode(text)
        except (ValueError, RecursionError):
            return None
        found = form.calls(value)
        if found is None:
            return None
        calls += found
        text = text[length:].lstrip().removeprefix(form.closes).strip()
    return tuple(calls), text


def _bare_calls(
    form: CallForm, text: str, tools: Sequence[str], ended: bool
) -> tuple[str, tuple[ToolCall, ...]]:
    """Without a mark, an answer is a call where it is JSON from beginning to end and names a tool that was offered."""
    lead = text.lstrip()
    if not ended:
        return ("" if not lead or lead[0] in "[{" else text), ()
    calls = form.calls(_json_or_none(text))
    if calls and all(call.name in tools for call in calls):
        return "", tuple(calls)
    return text, ()


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
