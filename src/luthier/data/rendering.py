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
from types import MappingProxyType
from typing import Any, cast

import jinja2
from transformers.utils.chat_template_utils import _cached_compile_jinja_template, render_jinja_template

from luthier.types import Conversation, DataError, Message, RowError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

_REASONING = ("reasoning_content", "thinking", "reasoning")

_REASON = 100
"""Most characters of a template's own words in the reason why a row is dropped."""

ChatMessage = dict[str, Any]
Variables = Mapping[str, Any]
"""Variables of a template that a call sets, such as enable_thinking."""
Modes = Mapping[int, Variables]


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
    if message.name is not None:
        chat["name"] = message.name
    if message.tool_call_id is not None:
        chat["tool_call_id"] = message.tool_call_id
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
        self._compiled: jinja2.Template | None = None
        self._has_generation = _GENERATION.search(source) is not None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_compiled": None}  # a compiled template is not sent to other processes

    def render(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Any] = (),
        *,
        generation_prompt: bool = False,
        variables: Variables = MappingProxyType({}),
    ) -> str:
        """The text of some messages, with `variables` of the template. Raises RowError where it refuses them."""
        return self._render(messages, tools, generation_prompt, variables)[0]

    def layout(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Any],
        end_texts: Sequence[str],
        *,
        turn_ends: bool = False,
        modes: Modes = MappingProxyType({}),
    ) -> Layout:
        """The whole conversation with its answers; with `turn_ends` it is cut after each answer's turn, too.

        modes: the variables of the template under which an answer is given, by its message; the text is that of the
        last answer's.

        Raises DataError where the conversation ends with an answer whose prompt is not a prefix of the text,
        or which does not end with a stop token: such a template cannot be trained and served alike.
        """
        positions = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        mode = modes.get(positions[-1], {}) if positions else {}
        text, generated = self._render(messages, tools, False, mode)
        if self._has_generation and len(generated) != len(positions):
            generated = _joined(generated)
        if self._has_generation and len(generated) != len(positions):
            raise DataError(
                f"the template marks {len(generated)} generated spans for {len(positions)} assistant messages"
            )
        cuts: list[int] = []
        answers: list[Answer] = []
        rewritten: list[int] = []
        for nth, k in enumerate(positions):
            prompt = self._prompt(messages[:k], tools, modes.get(k, {}))
            last = k == len(messages) - 1
            upto = text if last else self.render(messages[: k + 1], tools, variables=modes.get(k, {}))
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
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Any],
        *,
        turn_ends: bool = False,
        variables: Variables = MappingProxyType({}),
        modes: Modes = MappingProxyType({}),
    ) -> Layout:
        """Messages that the assistant is to continue under `variables`, cut where `layout` cuts them."""
        text = self.render(messages, tools, generation_prompt=True, variables=variables)
        positions = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        before = [self._prompt(messages[:k], tools, modes.get(k, variables)) for k in positions]
        if turn_ends:
            before += [
                self.render(messages[: k + 1], tools, variables=modes.get(k, variables)) for k in positions
            ]
        return Layout(text, tuple(len(part) for part in before if part and text.startswith(part)))

    def _prompt(
        self, messages: Sequence[ChatMessage], tools: Sequence[Any], variables: Variables
    ) -> str | None:
        """The text before an answer; None where the template cannot show these messages on their own."""
        try:
            return self.render(messages, tools, generation_prompt=True, variables=variables)
        except RowError:
            return None

    def _render(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Any],
        generation_prompt: bool,
        variables: Variables,
    ) -> tuple[str, list[tuple[int, int]]]:
        track = self._has_generation and not generation_prompt
        try:
            if not track:
                return self.plain(messages, tools, generation_prompt, variables), []
            # annotated as a text, it returns (texts, spans of each text)
            texts, spans = cast(Any, render_jinja_template)(
                conversations=[list(messages)],
                tools=list(tools) or None,
                chat_template=self.source,
                return_assistant_tokens_mask=True,
                add_generation_prompt=generation_prompt,
                **self._variables,
                **variables,
            )
            return texts[0], spans[0]
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"the chat template is not valid Jinja: line {error.lineno}: {error.message}"
            ) from error
        except (jinja2.TemplateError, TypeError) as error:
            why = str(error).strip().partition("\n")[0][:_REASON]
            raise RowError(f"the chat template refuses it ({why})") from error

    def compile_anew(self) -> jinja2.Template:
        """The template in an environment of its own, which is as that of transformers."""
        template: jinja2.Template = cast(Any, _cached_compile_jinja_template)(self.source)
        return template

    @property
    def compiled(self) -> jinja2.Template:
        """The template that it renders by."""
        if self._compiled is None:
            self._compiled = self.compile_anew()
        return self._compiled

    def use(self, compiled: jinja2.Template) -> None:
        """Render by this template from now on."""
        self._compiled = compiled

    def plain(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Any],
        generation_prompt: bool,
        variables: Variables = MappingProxyType({}),
    ) -> str:
        """What transformers renders, without the copies that it makes for what is no plain data; the gate compares.

        Raises what the template raises.
        """
        text: str = self.compiled.render(
            messages=[_with_names_of_reasoning(message) for message in messages],
            tools=list(tools) or None,
            documents=None,
            add_generation_prompt=generation_prompt,
            **self._variables,
            **variables,
        )
        return text


def _with_names_of_reasoning(message: ChatMessage) -> ChatMessage:
    """Reasoning under each name that templates know it by, as transformers gives it to them."""
    found = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


def _joined(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans that follow one another without a gap as one; a template may mark the parts of an answer apart."""
    joined: list[tuple[int, int]] = []
    for start, stop in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        elif stop > start:
            joined.append((start, stop))
    return joined


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
