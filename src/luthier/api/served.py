"""A loaded model under its names: what requests are made of, and what answers look like."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from luthier.answering import Answerer
from luthier.api.faults import ApiError, invalid
from luthier.api.fields import ChatRequest, ChatTurn, CompletionRequest, Drawing
from luthier.api.parts import require_openable
from luthier.data.chats import history
from luthier.data.encode import media_of
from luthier.data.read import RawRow
from luthier.data.registry import DEFAULT_COLUMNS, DEFAULT_TAGS, DatasetAttr
from luthier.engine.protocol import BASE
from luthier.methods.adapter_files import ADAPTER
from luthier.types import Conversation, GenerationError, LuthierError, Media, ModelError, Request

_COLUMNS = DEFAULT_COLUMNS["openai"].model_copy(update={"tools": "tools"})
_OPENAI = DatasetAttr(
    "request", "file", "", formatting="openai", columns=_COLUMNS, tags=DEFAULT_TAGS["openai"]
)
_SMALLEST = -9999.0
"""OpenAI's word for a probability of zero: JSON has no minus infinity."""


def conversation_of(turns: Sequence[ChatTurn], tools: Sequence[Mapping[str, Any]] = ()) -> Conversation:
    """Messages of a request, read as those of a data file are.

    Raises DataError for what is no conversation.
    """
    columns = {"messages": [turn.turn() for turn in turns], "tools": list(tools)}
    return history(RawRow(0, "messages", columns), _OPENAI)


def unknown_model(name: str, names: Sequence[str]) -> ApiError:
    """A name that nothing is served by."""
    message = f"there is no model {name!r} here; there are {', '.join(names)}"
    return ApiError(404, message, param="model", code="model_not_found")


@dataclass(frozen=True)
class Served:
    """A language model with its template. `name`: what the target is called in requests."""

    name: str
    answerer: Answerer
    created: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def names(self) -> dict[str, str | None]:
        """The adapter behind every name; None: the model as it is."""
        adapters = self.answerer.adapters
        if not adapters:
            return {self.name: None}
        trained = ADAPTER in adapters
        names: dict[str, str | None] = {self.name: ADAPTER if trained else BASE}
        further = ([BASE] if trained else []) + [name for name in adapters if name != ADAPTER]
        taken = [name for name in further if name in names]
        if taken:
            raise ModelError(f"--name: {taken[0]!r} is the name of an adapter already; choose another")
        return names | {name: name for name in further}

    @cached_property
    def decode(self) -> Callable[[Sequence[int]], str]:
        """Tokens of answers to text."""
        return self.answerer.decoder()

    def unknown(self, name: str) -> ApiError:
        """The error for a name that nothing is served by."""
        return unknown_model(name, list(self.names))

    # ---- requests

    def chat(self, body: ChatRequest) -> list[Request]:
        """The engine's requests for the `n` answers to a conversation. Raises ApiError for what cannot be answered."""
        adapter = self._adapter(body.model)
        tools: list[Mapping[str, Any]] = []
        if body.tools and body.tool_choice != "none":
            if not self.answerer.form.calls_back:
                raise invalid(
                    f"tools are not supported by this model: {self.answerer.form.no_calls}", "tools"
                )
            tools = [tool.given() for tool in body.tools]
        try:
            variables = self.answerer.variables({"template_variables": body.variables()})
        except LuthierError as error:
            said = body.chat_template_kwargs
            raise invalid(str(error), "chat_template_kwargs" if said else "reasoning_effort") from error
        try:
            conversation = conversation_of(body.messages, tools)
            media = self._media(conversation)
            prompt = self.answerer.template.prompt(conversation, variables)
        except LuthierError as error:
            raise invalid(str(error), "messages") from error
        return self._requests(body, [prompt], adapter, media)

    def _media(self, conversation: Conversation) -> tuple[Media, ...]:
        """What a conversation shows. Raises DataError for what the model does not take, or is not sent with it, and
        GenerationError for an engine that reads text alone."""
        media = media_of(conversation)
        for kind in {medium.kind for medium in media}:
            self.answerer.template.require(kind)
        if media and not self.answerer.engine.reads_media:
            raise GenerationError("this server's engine reads text alone; it was started with --engine vllm")
        require_openable(media)
        return media

    def completion(self, body: CompletionRequest) -> list[Request]:
        """The requests of all prompts, `n` for each. Raises ApiError as `chat` does."""
        adapter, template = self._adapter(body.model), self.answerer.template
        prompts = []
        for prompt in body.prompts():
            if isinstance(prompt, str):
                prompts.append([*template.begin_ids, *template.text(prompt)])
            elif max(prompt) >= len(template.tokenizer):
                raise invalid(f"prompt: the vocabulary has {len(template.tokenizer)} tokens", "prompt")
            else:
                prompts.append(prompt)
        return self._requests(body, prompts, adapter)

    def _adapter(self, name: str) -> str | None:
        if name not in self.names:
            raise self.unknown(name)
        return self.names[name]

    @property
    def takes_media(self) -> bool:
        """Whether requests may bring images, films or sounds."""
        return self.answerer.template.opener is not None and self.answerer.engine.reads_media

    def _requests(
        self,
        body: Drawing,
        prompts: Sequence[list[int]],
        adapter: str | None,
        media: tuple[Media, ...] = (),
    ) -> list[Request]:
        call = body.call()
        requests = []
        for prompt in prompts:
            self._require_room(len(prompt), call["max_new_tokens"])
            try:
                settings = self.answerer.settings(**call, num_beams=1)
                opener = self.answerer.template.opener
                request = Request(tuple(prompt), settings, adapter, media, opener)
                self.answerer.engine.limit(request)
            except GenerationError as error:
                raise invalid(str(error)) from error
            for number in range(body.n or 1):
                # Several answers to one seed differ, and each can be had again.
                seed = None if settings.seed is None else (settings.seed + number) % 2**63
                requests.append(replace(request, settings=replace(settings, seed=seed)))
        return requests

    def _require_room(self, length: int, wanted: int | None) -> None:
        most = self.answerer.engine.context_length
        if most is not None and length + (wanted or 1) > most:
            asked = f" and the answer {wanted}" if wanted else ""
            raise invalid(
                f"the model's context has {most} tokens; the prompt has {length}{asked}",
                "messages",
                "context_length_exceeded",
            )

    # ---- tokens

    def token_text(self, token: int) -> str:
        """The text of a token by itself."""
        return self.answerer.template.decode([token])

    def token_entry(self, token: int, logprob: float) -> dict[str, Any]:
        """A token as the chat API shows it; `bytes` is absent where the tokenizer does not tell them."""
        text = self.token_text(token)
        value: list[int] | None = list(text.encode())
        if "\N{REPLACEMENT CHARACTER}" in text:
            spelled = str(self.answerer.template.tokenizer.convert_ids_to_tokens(token))
            whole = all(character in _BYTES for character in spelled)
            value = [_BYTES[character] for character in spelled] if whole else None
        return {"token": text, "logprob": finite(logprob), "bytes": value}


def finite(logprob: float) -> float:
    """A log-probability that JSON can say."""
    return max(_SMALLEST, logprob)


_BYTES: Mapping[str, int] = {
    character: byte
    for byte, character in bytes_to_unicode().items()  # type: ignore[no-untyped-call]
}
"""The byte behind every character of a byte-level vocabulary."""
