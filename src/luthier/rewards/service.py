"""Rewards of a service: one POST for all answers of a rollout.

Asked {"model": ..., "messages": [conversation, ...]}, it answers {"scores": [number, ...]}. A conversation is a list of
{"role", "content"}, the answer its last message, or with `form: text` one string: the tokens of prompt and answer as
text, special tokens among them, as LLaMA-Factory's PPO sends them to its reward servers.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

from luthier.data.rendering import chat_messages
from luthier.experience import Completion, RewardError
from luthier.recipe.online import HttpRewardSpec
from luthier.rewards.base import Judge
from luthier.types import Conversation, Message, RecipeError

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, special tokens included."""

_SHOWN = 200
"""Characters of a service's own words in a message."""
_MOST_BYTES = 2**26
"""Of an answer; scores are a few bytes each."""
_VARIABLE = re.compile(r"\$\{(\w+)\}")


class Service(Judge):
    """A reward that a service computes.

    Connections that fail, answers that take longer than the timeout, and the states 429 and 5xx are tried again
    `retries` times, after 0.5, 1, 2, ... seconds, at most 8, or what the service's Retry-After says, at most 60.
    """

    def __init__(
        self,
        spec: HttpRewardSpec,
        name: str,
        key: str,
        decode: Decode,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        """`key` is the recipe's, for messages. Raises RecipeError for a variable in `headers` that the environment
        lacks."""
        super().__init__(name)
        self.spec, self._decode, self._wait = spec, decode, wait
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        for header, value in spec.headers.items():
            self._headers[header] = _expanded(value, f"{key}.headers.{header}")
        self._opener = urllib.request.build_opener(_NoRedirect)

    def __call__(self, completions: Sequence[Completion]) -> list[float]:
        if not completions:
            return []
        said = [self._said(completion) for completion in completions]
        body = json.dumps({"model": self.spec.model, "messages": said}).encode()
        for number in range(self.spec.retries + 1):
            try:
                answer = self._ask(body)
            except _TryAgainError as again:
                if number == self.spec.retries:
                    raise self._fault(completions, f"{again} ({_times(number + 1)})") from again.__cause__
                self._wait(min(8.0, 0.5 * 2**number) if again.after is None else again.after)
            except _RefusedError as refused:
                raise self._fault(completions, str(refused)) from refused.__cause__
            else:
                break
        return self._scores(answer, completions)

    def _said(self, completion: Completion) -> Any:
        prompt = completion.prompt
        if self.spec.form == "text":
            return self._decode([*prompt.ids, *completion.ids.tolist()])
        answered = (*prompt.conversation.messages, Message("assistant", completion.text))
        return chat_messages(Conversation(answered))

    def _ask(self, body: bytes) -> bytes:
        """What the service answers. Raises _TryAgainError and _RefusedError."""
        request = urllib.request.Request(self.spec.url, body, self._headers, method="POST")
        until = time.monotonic() + self.spec.timeout
        try:
            with self._opener.open(request, timeout=self.spec.timeout) as response:
                return _read(response, until)
        except urllib.error.HTTPError as error:
            words = _words_of(error)
            said = f"it answered {error.code} {error.reason}" + (f": {words}" if words else "")
            if error.code == 429 or error.code >= 500:
                raise _TryAgainError(said, _seconds(error.headers.get("Retry-After"))) from error
            if 300 <= error.code < 400:
                said += f"; it has moved to {error.headers.get('Location')}, name that"
            raise _RefusedError(said) from error
        except TimeoutError as error:
            raise _TryAgainError(f"no answer within {self.spec.timeout:g} seconds") from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise _TryAgainError(f"no answer within {self.spec.timeout:g} seconds") from error
            raise _TryAgainError(f"no connection: {error.reason}") from error
        except (OSError, http.client.HTTPException) as error:
            raise _TryAgainError(f"the connection broke: {type(error).__name__}: {error}") from error

    def _scores(self, answer: bytes, completions: Sequence[Completion]) -> list[float]:
        try:
            tree = json.loads(answer)
        except ValueError as error:
            raise self._fault(completions, f"it answered no JSON: {_shown(answer)!r}") from error
        scores = tree.get("scores") if isinstance(tree, dict) else None
        if not isinstance(scores, list):
            raise self._fault(
                completions, f'it answered no {{"scores": [number, ...]}} but {_shown(answer)!r}'
            )
        if len(scores) != len(completions):
            raise self._fault(completions, f"it answered {len(scores)} scores for {len(completions)} answers")
        for completion, score in zip(completions, scores, strict=True):
            if isinstance(score, bool) or not isinstance(score, int | float):
                raise self.fault(
                    completion.prompt, f"{self.spec.url} answered the score {score!r}, no number"
                )
        return scores

    def _fault(self, completions: Sequence[Completion], words: str) -> RewardError:
        others = f" and {len(completions) - 1} more" if len(completions) > 1 else ""
        place = completions[0].prompt.place
        return RewardError(f"reward {self.name}: {self.spec.url}: {words}; asked of {place}{others}")


class _TryAgainError(Exception):
    """What may be better the next time; `after`: seconds that the service asks to wait."""

    def __init__(self, words: str, after: float | None = None) -> None:
        super().__init__(words)
        self.after = after


class _RefusedError(Exception):
    """What will not be better the next time."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A POST that is sent elsewhere would become a GET without its body."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _read(response: http.client.HTTPResponse, until: float) -> bytes:
    """The whole body. Raises TimeoutError where it drips in for too long, IncompleteRead where it breaks off, and
    _RefusedError where it does not end."""
    parts, size = [], 0
    while part := response.read1(2**16):
        parts.append(part)
        size += len(part)
        if size > _MOST_BYTES:
            raise _RefusedError(f"its answer is longer than {_MOST_BYTES:,} bytes")
        if time.monotonic() > until:
            raise TimeoutError
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(parts)


def _expanded(value: str, key: str) -> str:
    """`${NAME}` replaced by the variable of the environment: a run keeps its recipe, and should keep no password."""

    def variable(found: re.Match[str]) -> str:
        if found[1] not in os.environ:
            raise RecipeError(f"{key}: the environment has no variable {found[1]}")
        return os.environ[found[1]]

    return _VARIABLE.sub(variable, value)


def _seconds(after: str | None) -> float | None:
    """Of a Retry-After, where it is a number and no date."""
    return min(60.0, float(after)) if after is not None and after.strip().isdigit() else None


def _words_of(error: urllib.error.HTTPError) -> str:
    """The body of an error, as far as it comes."""
    with error:
        try:
            return _shown(error.read(4 * _SHOWN))
        except (OSError, http.client.HTTPException):
            return ""


def _shown(answer: bytes) -> str:
    text = " ".join(answer.decode("utf-8", "replace").split())
    return text if len(text) <= _SHOWN else text[:_SHOWN] + " ..."


def _times(number: int) -> str:
    return "tried once" if number == 1 else f"tried {number} times"
