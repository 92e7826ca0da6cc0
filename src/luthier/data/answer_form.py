"""What of an answer is reasoning, what is text and what are tool calls, as the template itself writes them.

    AnswerForm.of(template)            learnt by rendering an answer whose parts are known
    form.after(prompt)                 the same for the answer to a prompt, which may begin the reasoning itself
    form.read(text, tools=, ended=)    an answer, or the beginning of one -> its parts
    SpokenStream(form)                 an answer in pieces -> what each adds to the parts

Nothing is known of families here: the marks around reasoning and calls are those that the template puts around the
parts of a made-up answer; what shapes there are stands in `data.calls`. A template that writes calls in none of them
has no call form, and says why.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from luthier.data.calls import harmony, table
from luthier.data.calls.form import ID, CallForm, Offered, without_begun
from luthier.data.calls.probe import CALLS, TOOLS, Probe
from luthier.data.template import ChatTemplate
from luthier.types import Conversation, DataError, Message, ToolCall

THINK = ("<think>", "</think>")
"""What models write around reasoning by themselves."""
_LAST_MARK = re.compile(r"<[^<>]+>|\[[^\[\]]+\]")
_ASKED, _WHY, _SAID = "How-is-it-so?", "Because-so-it-is", "Thus-it-is-said"


@dataclass(frozen=True, slots=True)
class Spoken:
    """The parts of an answer."""

    content: str
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """The marks of a template. Empty `reason_closes`: it marks no reasoning. `reason_opens` is empty where the prompt
    begins the reasoning. `no_calls` says why there is no call form. `channels`: answers are messages with channels,
    which say what is reasoning, content and call (`data.calls.harmony`); the other fields are then not used."""

    reason_opens: str = ""
    reason_closes: str = ""
    call: CallForm | None = None
    no_calls: str = ""
    channels: bool = False

    @staticmethod
    def of(template: ChatTemplate) -> AnswerForm:
        """What the template's own rendering tells."""
        said = _said(template)
        if harmony.is_written(said):
            return AnswerForm(channels=True)
        opens, closes = _reasoning_marks(template)
        try:
            probe = _probe(template, closes)
        except DataError as error:
            return AnswerForm(opens, closes, None, str(error))
        call = table.learn(probe)
        why = "" if call else "the chat template writes tool calls in a form that is not read back"
        return AnswerForm(opens, closes, call, why)

    def after(self, prompt: str) -> AnswerForm:
        """The form of the answer to a prompt, of which the end is enough.

        `THINK` where the template marks no reasoning; no opening mark where the prompt ends with it; no marks where
        the prompt ends the reasoning itself.
        """
        if self.channels:
            return self
        form = self if self.reason_closes else replace(self, reason_opens=THINK[0], reason_closes=THINK[1])
        if form.reason_closes and prompt.rstrip().endswith(form.reason_closes):
            return replace(form, reason_opens="", reason_closes="")
        opened = form.reason_opens and prompt.rstrip().endswith(form.reason_opens)
        return replace(form, reason_opens="") if opened else form

    @property
    def marks(self) -> tuple[str, ...]:
        """The marks, which belong to an answer's text even where they are special tokens."""
        if self.channels:
            return harmony.MARKS
        calls = self.call.marks if self.call else ()
        return tuple(mark for mark in (self.reason_opens, self.reason_closes, *calls) if mark)

    @property
    def calls_back(self) -> bool:
        """Whether calls are read back."""
        return self.channels or self.call is not None

    def read(self, text: str, *, tools: Offered = (), ended: bool = True) -> Spoken:
        """The parts of an answer's text. tools: names of those that it may call, with the JSON schemas of their
        parameters where it is a mapping; without any, nothing is a call.

        With `ended` false the text goes on, and only what cannot change any more is returned: each part of the
        beginning is a prefix of that of the whole.
        """
        if self.channels:
            content, reasoning, calls = harmony.read(text, tools, ended)
            return Spoken(content, reasoning, calls)
        reasoning, rest = self._reasoning(text, ended)
        if not tools or self.call is None:
            return Spoken(rest, reasoning)
        if not ended:
            return Spoken(self.call.certain(rest, tools), reasoning)
        content, calls = self.call.read(rest, tools)
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
            before = without_begun(before, closes)
        # Only the newlines around marks are the template's: an answer may begin with an indented line.
        return before.strip("\n"), after.lstrip("\n")


class SpokenStream:
    """The parts of an answer that comes in pieces; `spoken` is all of them so far."""

    def __init__(self, form: AnswerForm, tools: Offered = ()) -> None:
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
    if not found or not said:
        return "", ""
    if not before.strip() and not _opens_reasoning(template):
        # the prompt opens the reasoning and closes it again: without it an answer may open its own
        whole = template.rendering(Conversation((Message("user", _ASKED), Message("assistant", _SAID, _WHY))))
        marks = _LAST_MARK.findall(whole.partition(_WHY)[0])
        return (marks[-1] if marks else ""), between.strip()
    return before.strip(), between.strip()


def _opens_reasoning(template: ChatTemplate) -> bool:
    """Whether what an answer begins with is a part of the reasoning, because its prompt is a prefix of the whole."""
    conversation = Conversation((Message("user", _ASKED), Message("assistant", _SAID, reasoning=_WHY)))
    prompt = template.decode(template.prompt(Conversation(conversation.messages[:1])))
    return template.rendering(conversation).startswith(prompt)


def _said(template: ChatTemplate) -> str:
    """A plain answer as the template writes it; "" where it takes none."""
    try:
        return _answer_text(template, Message("assistant", _SAID))
    except DataError:
        return ""


def _probe(template: ChatTemplate, reason_closes: str) -> Probe:
    """The made-up calls as the template writes them. Raises DataError where it has no place for tools or calls."""

    def written(*calls: ToolCall) -> str:
        text = _answer_text(template, Message("assistant", tool_calls=calls), TOOLS)
        for call in calls:
            text = text.replace(call.id or ID, ID)
        return text.rpartition(reason_closes)[2] if reason_closes else text

    source = template.source
    try:
        one = written(CALLS[0])
    except DataError:
        if table.known(source) is None:
            raise
        return Probe("", "", source)
    try:
        return Probe(one, written(*CALLS), source)
    except DataError:
        # some templates take one call in an answer
        return Probe(one, "", source)


def _answer_text(template: ChatTemplate, answer: Message, tools: tuple[Mapping[str, Any], ...] = ()) -> str:
    """What the model would have to write for this answer, without what ends it.

    From the text alone: a template that cannot be trained, because its prompt is no prefix of it, can be talked to.
    """
    asked = Message("user", _ASKED)
    whole = template.rendering(Conversation((asked, answer), tools)).rpartition(_ASKED)[2]
    prompt = template.decode(template.prompt(Conversation((asked,), tools))).rpartition(_ASKED)[2]
    size = len(prompt)
    if not whole.startswith(prompt):
        # up to the last mark or line that both have: `<t` is a part of different marks
        same = next((n for n, (a, b) in enumerate(zip(whole, prompt, strict=False)) if a != b), 0)
        size = max(whole.rfind(">", 0, same), whole.rfind("\n", 0, same)) + 1
    text = whole[size:].rstrip()
    ends = [template.decode([index]) for index in template.stop_ids]
    if _SAID not in answer.content:
        ends.append(_turn_end(template))
    while end := next((end for end in ends if end and text.endswith(end)), ""):
        text = text.removesuffix(end).rstrip()
    return text


def _turn_end(template: ChatTemplate) -> str:
    """What stands after a plain answer; "" where the template shows none."""
    try:
        plain = template.rendering(Conversation((Message("user", _ASKED), Message("assistant", _SAID))))
    except DataError:
        return ""
    return plain.rpartition(_SAID)[2].strip()
