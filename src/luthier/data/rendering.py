"""Conversation -> text, and where in that text each answer stands.

The text comes from the Jinja template alone, rendered by transformers' own function, so it is what
`tokenizer.apply_chat_template` gives. An answer's place is found by rendering prefixes of the conversation:
what the model will be shown when it is to give answer k is `messages[:k]` with the generation prompt, and the
answer is what the rendering goes on with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from luthier.types import Conversation, DataError, Message, RowError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

_REASON = 100
"""Most characters of a template's own words in the reason why a row is dropped."""

ChatMessage = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """Characters [start, stop) that the assistant generates as message `message`, stop token included.

    Characters [stop, end) are what the template writes before the next turn.
    """

    message: int
    start: int
    stop: int
    end: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A rendered conversation.

    `cuts` are the ends of generation prompts: tokens never reach across one, because the model starts there.
    `rewritten` are assistant messages that are not shown here as they were when they were generated.
    """

    text: str
    cuts: tuple[int, ...]
    answers: tuple[Answer, ...] = ()
    rewritten: tuple[int, ...] = ()


def chat_messages(conversation: Conversation) -> list[ChatMessage]:
    """Messages in the form that chat templates expect."""
    return [_chat_message(message) for message in conversation.messages]


def _chat_message(message: Message) -> ChatMessage:
    chat: ChatMessage = {
        "role": message.role,
        "content": _parts(message) if message.media else message.content,
    }
    if message.reasoning is not None:
        chat["reasoning_content"] = message.reasoning
    if message.tool_calls:
        chat["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            | ({} if call.id is None else {"id": call.id})
            for call in message.tool_calls
        ]
    return chat


def _parts(message: Message) -> list[dict[str, str]]:
    """Content with media as the list of parts that templates of models with eyes and ears expect."""
    parts: list[dict[str, str]] = []
    last = 0
    for one in message.media:
        if message.content[last : one.at]:
            parts.append({"type": "text", "text": message.content[last : one.at]})
        parts.append({"type": one.kind})
        last = one.at
    return [*parts, {"type": "text", "text": message.content[last:]}] if message.content[last:] else parts


def with_default_system(source: str, system: str) -> str:
    """The same template, for which a conversation without a system prompt has this one.

    The prompt becomes part of the template, so that the saved template renders what was trained.
    """
    message = json.dumps({"role": "system", "content": system}, ensure_ascii=False)
    return (
        "{%- if not messages or messages[0]['role'] != 'system' -%}"
        "{%- set messages = [" + message + "] + messages -%}{%- endif -%}" + source
    )


class Renderer:
    """One Jinja template with the tokenizer's special tokens as its variables.

    `end_texts` in its methods are the spellings of the tokens that end an answer.
    """

    def __init__(self, source: str, variables: Mapping[str, Any]) -> None:
        self.source = source
        self._variables = dict(variables)
        self._has_generation = _GENERATION.search(source) is not None

    def render(
        self, messages: Sequence[ChatMessage], tools: Sequence[Any] = (), *, generation_prompt: bool = False
    ) -> str:
        """The text of some messages. Raises RowError where the template refuses them."""
        return self._render(messages, tools, generation_prompt)[0]

    def layout(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Any],
        end_texts: Sequence[str],
        *,
        turn_ends: bool = False,
    ) -> Layout:
        """The whole conversation with its answers; with `turn_ends` it is cut after each answer's turn, too.

        Raises DataError where the conversation ends with an answer whose prompt is not a prefix of the text,
        or which does not end with a stop token: such a template cannot be trained and served alike.
        """
        text, generated = self._render(messages, tools, False)
        positions = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        if self._has_generation and len(generated) != len(positions):
            raise DataError(
                f"the template marks {len(generated)} generated spans for {len(positions)} assistant messages"
            )
        cuts: list[int] = []
        answers: list[Answer] = []
        rewritten: list[int] = []
        for nth, k in enumerate(positions):
            prompt = self._prompt(messages[:k], tools)
            upto = text if k == len(messages) - 1 else self.render(messages[: k + 1], tools)
            shown = prompt is not None and text.startswith(prompt)
            if shown and prompt is not None:
                cuts.append(len(prompt))
            if not shown or prompt is None or not text.startswith(upto) or len(upto) <= len(prompt):
                if k == len(messages) - 1:
                    raise DataError(_not_a_prefix(text, prompt))
                rewritten.append(k)
                continue
            span = generated[nth] if self._has_generation else None
            answers.append(_answer(k, text, len(prompt), len(upto), end_texts, span))
            cuts += [len(upto)] if turn_ends else []
        return Layout(text, tuple(cuts), tuple(answers), tuple(rewritten))

    def prompt_layout(
        self, messages: Sequence[ChatMessage], tools: Sequence[Any], *, turn_ends: bool = False
    ) -> Layout:
        """Messages that the assistant is to continue, cut where `layout` cuts them."""
        text = self.render(messages, tools, generation_prompt=True)
        positions = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        before = [self._prompt(messages[:k], tools) for k in positions]
        if turn_ends:
            before += [self.render(messages[: k + 1], tools) for k in positions]
        return Layout(text, tuple(len(part) for part in before if part and text.startswith(part)))

    def _prompt(self, messages: Sequence[ChatMessage], tools: Sequence[Any]) -> str | None:
        """The text before an answer; None where the template cannot show these messages on their own."""
        try:
            return self.render(messages, tools, generation_prompt=True)
        except RowError:
            return None

    def _render(
        self, messages: Sequence[ChatMessage], tools: Sequence[Any], generation_prompt: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        track = self._has_generation and not generation_prompt
        try:
            # annotated as a text, it returns (texts, spans of each text)
            texts, spans = cast(Any, render_jinja_template)(
                conversations=[list(messages)],
                tools=list(tools) or None,
                chat_template=self.source,
                return_assistant_tokens_mask=track,
                add_generation_prompt=generation_prompt,
                **self._variables,
            )
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"the chat template is not valid Jinja: line {error.lineno}: {error.message}"
            ) from error
        except (jinja2.TemplateError, TypeError) as error:
            why = str(error).strip().partition("\n")[0][:_REASON]
            raise RowError(f"the chat template refuses it ({why})") from error
        return texts[0], spans[0] if track else []


def _answer(
    k: int, text: str, start: int, end: int, end_texts: Sequence[str], generated: tuple[int, int] | None
) -> Answer:
    stop = max(
        (text.rfind(token, start, end) + len(token) for token in end_texts if token in text[start:end]),
        default=0,
    )
    if generated is not None:
        # a span may take in the end of the prompt, which is given anyway; it may not leave anything out
        if generated[0] > start:
            raise DataError(
                f"the template's generated span starts at {text[generated[0] :][:30]!r}, but its "
                f"generation prompt ends before {text[start:][:30]!r}: what lies "
                "between would be neither given nor learnt"
            )
        stop = generated[1] if stop <= generated[1] else 0
    if not stop:
        raise DataError(
            f"the stop token is not supervised: the template shows message {k} as {text[start:end][-60:]!r}, "
            f"which does not end with {' or '.join(map(repr, end_texts)) or 'any known stop token'}"
        )
    return Answer(k, start, stop, end)


def _not_a_prefix(text: str, prompt: str | None) -> str:
    if prompt is None:
        return "the template cannot show what comes before the last answer on its own"
    same = next(
        (i for i, (a, b) in enumerate(zip(text, prompt, strict=False)) if a != b), min(len(text), len(prompt))
    )
    return (
        "the prompt is not a prefix of the training text: generation would see "
        f"{prompt[max(0, same - 20) : same + 40]!r} where training sees "
        f"{text[max(0, same - 20) : same + 40]!r}. Use a template made for training, "
        "or a named one (data.template)"
    )
