"""Reasoning in conversations: which part of an answer it is, and what a template does with it.

    Reasoning(source, variables, spec)   the rules of one template with its policy
    split_reasoning(message, template)   an answer that begins with marked reasoning -> the same with two fields
    Habits                               what a template does, learnt by rendering made-up answers

The policy itself is in `thinking_policy`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from operator import is_
from typing import Any

from luthier.data.rendering import ChatMessage, Modes, Renderer, Variables, chat_messages
from luthier.recipe.thinking import ThinkingSpec
from luthier.types import Conversation, DataError, Message, Row, RowError

FIELDS = ("reasoning_content", "thinking", "reasoning")
"""What templates call the reasoning of a message; the first one that a template reads is the one that it gets."""

THINK = ("<think>", "</think>")
_CALL = {"id": "call0", "type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
_INPUTS = ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "cut")
_EMPTY_END = re.compile(r"(<think>\s*)?</think>\s*\Z")
_ASKED, _AGAIN, WHY, _SAID = "How?", "And then?", "Because-so-it-is", "Thus-it-is-said"


def knows(source: str, name: str) -> bool:
    """Whether a template speaks of a variable."""
    return re.search(rf"\b{re.escape(name)}\b", source) is not None


def field_of(source: str, variables: Mapping[str, Any]) -> str | None:
    """The field whose text a template shows as an answer's reasoning; None where it has no place for any.

    Templates that only pass the field on, or take it out of every answer, have none.
    """
    for name in FIELDS:
        if re.search(rf"\.{name}\b|\[?['\"]{name}['\"]", source) is None:
            continue
        tried = Habits(source, variables, name)
        # Some templates show it before a call of a tool alone.
        answers = (tried.answer(WHY), tried.answer(WHY) | {"tool_calls": [_CALL]})
        if any(WHY in tried.text(asked(), said, enable=mode) for said in answers for mode in (None, True)):
            return name
    return None


@dataclass(frozen=True, slots=True)
class Marks:
    """What stands before and after reasoning, to the last newline, and an answer's beginning without any."""

    opens: str = "<think>\n"
    closes: str = "\n</think>\n\n"
    empty: str = "<think>\n\n</think>\n\n"


def split_reasoning(message: Message, template: Reasoning) -> Message:
    """An answer whose content begins with reasoning in the template's marks, or in `THINK`, as two fields.

    Newlines around the marks are the template's. Without a closing mark everything stays content. Raises
    RowError for spans in the reasoning, which are spans of the content.
    """
    if message.role != "assistant" or message.reasoning is not None or "<" not in message.content:
        return message
    text, marks = message.content.lstrip(), template.marks
    for opens, closes in ((marks.opens.strip(), marks.closes.strip()), THINK):
        if not opens or not closes or not text.startswith(opens):
            continue
        reasoning, found, content = text[len(opens) :].partition(closes)
        if not found:
            return message
        after = content.lstrip("\n")
        moved = len(message.content) - len(after)
        if any(start < moved for start, _, _ in message.spans):
            raise RowError("a span covers reasoning, which the template shows apart from the content")
        spans = tuple((start - moved, stop - moved, weight) for start, stop, weight in message.spans)
        return replace(message, reasoning=reasoning.strip("\n"), content=after, spans=spans)
    return message


BEGIN, END = "{#- thinking -#}", "{#- /thinking -#}"
POLICY = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)


def without_policy(source: str) -> str:
    """A template without the policy that `thinking_policy` put there."""
    return POLICY.sub("", source)


# --------------------------------------------------------------------------------------------------
# What a template does


def asked(text: str = _ASKED) -> ChatMessage:
    return {"role": "user", "content": text}


class Habits:
    """What a template does with made-up answers; `field` as `field_of` says."""

    def __init__(self, source: str, variables: Mapping[str, Any], field: str | None) -> None:
        self.source, self.field = source, field
        self._renderer = Renderer(source, variables)

    def answer(self, reasoning: str | None = None, content: str = _SAID) -> ChatMessage:
        said: ChatMessage = {"role": "assistant", "content": content}
        return said if reasoning is None else said | {self.field or FIELDS[0]: reasoning}

    def text(self, *turns: ChatMessage, enable: bool | None = None, prompt: bool = False) -> str:
        """The rendering; "" where the template refuses it."""
        said = {} if enable is None else {"enable_thinking": enable}
        try:
            return self._renderer.render(list(turns), generation_prompt=prompt, variables=said)
        except RowError:
            return ""

    @cached_property
    def marks(self) -> Marks:
        """Those of the template, `<think>` where it has no place for reasoning."""
        plain, text = Marks(), self.text(asked(), self.answer(WHY))
        before, found, rest = text.partition(WHY)
        closes, said, _ = rest.partition(_SAID)
        if not (found and said):
            return replace(plain, empty=self._empty_prompt() or plain.empty)
        at = before.rfind(THINK[0])
        prompts = (self.text(asked(), prompt=True, enable=True), self.text(asked(), prompt=True))
        given = next((p for p in prompts if p and before.startswith(p)), "")
        opens = before[at:] if at >= len(self.text(asked())) else before[len(given) :]
        return Marks(opens, closes, self._empty_prompt() or opens + closes)

    def _empty_prompt(self) -> str:
        """The empty thought with which the prompt of the non-thinking mode ends, and the other one does not."""
        on, off = (self.text(asked(), prompt=True, enable=mode) for mode in (True, False))
        found = _EMPTY_END.search(off)
        return found.group() if found is not None and not on.endswith(found.group()) else ""

    @cached_property
    def modes(self) -> tuple[Mapping[str, bool], Mapping[str, bool]]:
        """What an answer with reasoning, and one without, needs `enable_thinking` to be, because the template shows
        it after the prompt of that mode alone; empty where it need not be set."""
        if not knows(self.source, "enable_thinking"):
            return {}, {}
        return self._needed(self.answer(WHY), True), self._needed(self.answer(), False)

    def _needed(self, answer: ChatMessage, enable: bool) -> Mapping[str, bool]:
        def follows(mode: bool | None) -> bool:
            prompt = self.text(asked(), prompt=True, enable=mode)
            return bool(prompt) and self.text(asked(), answer, enable=mode).startswith(prompt)

        return {"enable_thinking": enable} if not follows(None) and follows(enable) else {}

    def keeps(self) -> bool:
        """Whether an earlier answer is shown with its reasoning and marks."""
        shown = self.marks.opens + WHY + self.marks.closes + _SAID
        return shown in self.text(asked(), self.answer(WHY), asked(_AGAIN))

    def keeps_content(self) -> bool:
        """Whether an earlier answer is shown with reasoning that is written into its content."""
        inline = f"{THINK[0]}\n{WHY}\n{THINK[1]}\n\n{_SAID}"
        return inline in self.text(asked(), self.answer(content=inline), asked(_AGAIN))

    def strips(self) -> bool:
        """Whether an earlier answer is shown without its reasoning, however that is given."""
        inline = f"<think>\n{WHY}\n</think>\n\n{_SAID}"
        shown = [
            self.text(asked(), answer, asked(_AGAIN))
            for answer in (self.answer(WHY), self.answer(content=inline))
        ]
        return all(_SAID in text and WHY not in text for text in shown)

    def begins_empty(self, *, in_prompt: bool) -> bool:
        """Whether an answer without reasoning begins with an empty thought, as part of itself or of its prompt."""
        mode = False if in_prompt else None
        text = self.text(asked(), self.answer(), enable=mode)
        prompt = self.text(asked(), prompt=True, enable=mode)
        if not prompt or not text.startswith(prompt):
            return False
        if in_prompt:
            return text[len(prompt) :].lstrip("\n").startswith(_SAID)
        # a prompt that begins the reasoning has the opening mark of the empty thought already
        at = text.rfind(self.marks.empty.rstrip("\n"), 0, text.find(_SAID))
        return at >= 0 and at + len(self.marks.empty.rstrip("\n")) > len(prompt)

    def keeps_empty(self) -> bool:
        """Whether an earlier answer without reasoning begins with an empty thought."""
        return self.marks.empty + _SAID in self.text(asked(), self.answer(), asked(_AGAIN))


@lru_cache(maxsize=64)
def _habits(source: str, variables: tuple[tuple[str, str], ...]) -> Habits:
    return Habits(source, dict(variables), field_of(without_policy(source), dict(variables)))


def habits(source: str, variables: Mapping[str, Any]) -> Habits:
    """What a template does; learnt once."""
    texts = sorted((key, value) for key, value in variables.items() if isinstance(value, str))
    return _habits(source, tuple(texts))


# --------------------------------------------------------------------------------------------------
# A template with its policy


class Reasoning:
    """The reasoning of conversations, for one template and the policy in it."""

    def __init__(self, source: str, variables: Mapping[str, Any], spec: ThinkingSpec) -> None:
        self.spec = spec
        self._habits = habits(source, variables)

    @property
    def field(self) -> str | None:
        """What the template calls the reasoning of a message; None where it has no place for it."""
        return self._habits.field

    @property
    def taken_out(self) -> bool:
        """Whether the policy takes all reasoning out."""
        return self.spec.answers == "none"

    @property
    def marks(self) -> Marks:
        """What the template writes around reasoning."""
        return self._habits.marks

    @cached_property
    def _has_modes(self) -> bool:
        return self.spec.empty == "prompt" or any(self._habits.modes)

    def split(self, conversation: Conversation) -> Conversation:
        """The conversation with marked reasoning at the beginning of answers as their reasoning, where the template
        has a place for it."""
        if self.field is None:
            return conversation
        messages = tuple([split_reasoning(message, self) for message in conversation.messages])
        if all(map(is_, messages, conversation.messages)):
            return conversation
        return replace(conversation, messages=messages)

    def split_row(self, row: Row) -> Row:
        """A row with its conversations split. Raises RowError as `split_reasoning` does."""
        asked = None if row.conversation is None else self.split(row.conversation)
        rejected = None if row.rejected is None else self.split(row.rejected)
        if asked is row.conversation and rejected is row.rejected:
            return row
        return replace(row, conversation=asked, rejected=rejected)

    def chat(self, conversation: Conversation) -> list[ChatMessage]:
        """The messages as the template is given them."""
        messages = chat_messages(self.split(conversation))
        if self.field not in (None, FIELDS[0]):
            for message in messages:
                if FIELDS[0] in message:
                    message[str(self.field)] = message.pop(FIELDS[0])
        return messages

    def mode(self, message: Message) -> Variables:
        """The variables of the template under which an answer is given.

        With `empty: prompt` those of its thinking mode where the answer has reasoning, else of its non-thinking mode;
        and so where the template shows the answer after no other prompt. Else none.
        """
        if not self._has_modes:
            return {}
        opens = (self.marks.opens.strip(), THINK[0])
        begun = message.content.lstrip().startswith(tuple(mark for mark in opens if mark))
        reasons = bool(message.reasoning) or begun
        if self.spec.empty == "prompt":
            return {"enable_thinking": reasons and not self.taken_out}
        return self._habits.modes[0 if reasons else 1]

    def modes(self, conversation: Conversation) -> Modes:
        """That of every answer that has one, by its message."""
        if not self._has_modes:
            return {}
        said = {k: self.mode(m) for k, m in enumerate(conversation.messages) if m.role == "assistant"}
        return {k: mode for k, mode in said.items() if mode}

    def last_mode(self, conversation: Conversation) -> Variables:
        """That of the last answer, which the whole conversation is rendered with."""
        last = next((m for m in reversed(conversation.messages) if m.role == "assistant"), None)
        return {} if last is None else self.mode(last)


def require_known(source: str, variables: Mapping[str, Any], reserved: Sequence[str]) -> None:
    """Raise DataError for a variable that a template does not read, which it would ignore."""
    for name in variables:
        if name in (*_INPUTS, *reserved):
            raise DataError(f"{name} is the template's own input and cannot be set as one of its variables")
        if not knows(source, name):
            raise DataError(
                f"the chat template does not know {name}: setting it would change nothing; leave it out"
            )
