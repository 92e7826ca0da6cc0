"""Answers as the JSON objects of OpenAI's API, whole and in chunks."""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, ClassVar

from luthier.api.answers import Answer
from luthier.api.served import Served, finite
from luthier.data.answer_form import Spoken
from luthier.types import TokenChoice, ToolCall


@dataclass(frozen=True)
class Shape(ABC):
    """What all objects of one answer have in common. `logprobs`: whether they were asked for."""

    served: Served
    model: str
    logprobs: bool
    with_usage: bool = False
    """Of a stream: every chunk has the field, and the last one the counts."""
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    prefix: ClassVar[str]
    kinds: ClassVar[tuple[str, str]]
    """Names of the whole object and of a chunk."""

    def whole(self, answers: Sequence[Answer], usage: Mapping[str, int]) -> dict[str, Any]:
        """The object of an answer that is complete."""
        return self._object(self.kinds[0], [self.choice(answer) for answer in answers]) | {"usage": usage}

    def chunk(self, choices: list[dict[str, Any]], usage: Mapping[str, int] | None = None) -> dict[str, Any]:
        """One of the objects of a stream."""
        head = self._object(self.kinds[1], choices)
        return head | {"usage": usage} if self.with_usage else head

    @abstractmethod
    def choice(self, answer: Answer) -> dict[str, Any]:
        """An answer that is complete."""

    @abstractmethod
    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream begins with, if anything."""

    @abstractmethod
    def piece(self, index: int, new: Spoken, tokens: Sequence[TokenChoice]) -> dict[str, Any]:
        """What `tokens` add to an answer."""

    @abstractmethod
    def closing(self, answer: Answer) -> dict[str, Any]:
        """The last of an answer."""

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": f"{self.prefix}-{self.id}", "object": kind, "created": self.created}
        return head | {"model": self.model, "choices": choices}


class ChatShape(Shape):
    """Of /v1/chat/completions."""

    prefix = "chatcmpl"
    kinds = ("chat.completion", "chat.completion.chunk")

    def choice(self, answer: Answer) -> dict[str, Any]:
        assert answer.end is not None
        spoken = answer.spoken
        message: dict[str, Any] = {"role": "assistant", "content": spoken.content, "refusal": None}
        if spoken.reasoning:
            message["reasoning_content"] = spoken.reasoning
        if spoken.calls:
            message["tool_calls"] = [_call(call) for call in spoken.calls]
            message["content"] = spoken.content or None
        return {
            "index": answer.index,
            "message": message,
            "logprobs": self._logprobs(answer.end.choices),
            "finish_reason": answer.finish_reason,
        }

    def opening(self, index: int) -> dict[str, Any]:
        return self._delta(index, {"role": "assistant", "content": ""}, None)

    def piece(self, index: int, new: Spoken, tokens: Sequence[TokenChoice]) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        if new.reasoning:
            delta["reasoning_content"] = new.reasoning
        if new.content:
            delta["content"] = new.content
        if new.calls:
            delta["tool_calls"] = [{"index": number, **_call(call)} for number, call in enumerate(new.calls)]
        return self._delta(index, delta, self._logprobs(tokens))

    def closing(self, answer: Answer) -> dict[str, Any]:
        return self._delta(answer.index, {}, None) | {"finish_reason": answer.finish_reason}

    def _delta(self, index: int, delta: dict[str, Any], logprobs: Any) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _logprobs(self, tokens: Sequence[TokenChoice]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        entry = self.served.token_entry
        content = [
            entry(choice.token, choice.logprob or 0.0)
            | {"top_logprobs": [entry(*pair) for pair in choice.top]}
            for choice in tokens
        ]
        return {"content": content, "refusal": None}


class CompletionShape(Shape):
    """Of /v1/completions."""

    prefix = "cmpl"
    kinds = ("text_completion", "text_completion")

    def choice(self, answer: Answer) -> dict[str, Any]:
        assert answer.end is not None
        logprobs = self._logprobs(answer.end.choices)
        return self._text(answer.index, answer.spoken.content, logprobs, answer.finish_reason)

    def opening(self, index: int) -> None:
        return None

    def piece(self, index: int, new: Spoken, tokens: Sequence[TokenChoice]) -> dict[str, Any]:
        return self._text(index, new.content, self._logprobs(tokens), None)

    def closing(self, answer: Answer) -> dict[str, Any]:
        return self._text(answer.index, "", None, answer.finish_reason)

    def _text(self, index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, tokens: Sequence[TokenChoice]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        text = self.served.token_text
        texts = [text(choice.token) for choice in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [finite(choice.logprob or 0.0) for choice in tokens],
            "top_logprobs": [
                {text(token): finite(value) for token, value in choice.top} for choice in tokens
            ],
            "text_offset": list(accumulate((len(part) for part in texts), initial=0))[: len(texts)],
        }


def _call(call: ToolCall) -> dict[str, Any]:
    arguments = call.arguments
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    # Nine letters and digits: Mistral's templates take no other id when it comes back.
    name = secrets.token_hex(5)[:9]
    return {"id": name, "type": "function", "function": {"name": call.name, "arguments": text}}
