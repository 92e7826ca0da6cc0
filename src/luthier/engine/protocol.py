"""What every engine does: prompts as token ids in, answers as token ids out, one request or many at a time.

An engine says how a request is taken, stepped and given up; one answer, one stream and many answers follow from that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

from luthier.generation import Event, Generation, GenerationError, GenerationSettings, Request

BASE = "base"
"""The name of the model without its adapters."""

Decode = Callable[[Sequence[int]], str]


class Engine(ABC):
    """Answers many requests at once. Not for several threads: one of them steps.

    adapters: names that requests may choose; the first is the default. context_length: tokens that prompt and answer
    may have together, where the model has a bound. decode: tokens to text, for stop strings.
    """

    reads_media: ClassVar[bool] = False
    """Whether requests may have images, films and sounds, of a model that takes them."""

    def __init__(self, adapters: Sequence[str], context_length: int | None, decode: Decode | None) -> None:
        self.adapters = tuple(adapters)
        self.context_length = context_length
        self._decode = decode

    @property
    @abstractmethod
    def rows(self) -> int:
        """The most that are answered at once."""

    @property
    @abstractmethod
    def choices(self) -> tuple[str, ...]:
        """The names that a request may have as its adapter; none where adapters are merged, or there are none."""

    # ---- for who keeps the loop

    @abstractmethod
    def submit(self, request: Request) -> int:
        """Put a request behind those that wait; its ticket is in the events of `step`.

        Raises GenerationError for one that cannot be held, or that wants beams.
        """

    @abstractmethod
    def step(self) -> list[Event]:
        """One token for every row under way, those that come in now among them."""

    @abstractmethod
    def cancel(self, ticket: int) -> Generation | None:
        """Forget a request, and free its room; what it had, or None where it was finished before."""

    @abstractmethod
    def abandon(self) -> list[int]:
        """Forget all that is under way, after a step that raised; the tickets of those that still wait."""

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether any request waits or is under way."""

    @property
    @abstractmethod
    def waiting(self) -> int:
        """Requests that wait for room."""

    @property
    @abstractmethod
    def running(self) -> int:
        """Requests under way."""

    def limit(self, request: Request) -> int:
        """The most tokens that the answer can have. Raises GenerationError where there is no room for one."""
        settings, length = request.settings, len(request.prompt)
        if not length:
            raise GenerationError("the prompt is empty")
        if request.media and not self.reads_media:
            raise GenerationError(
                "this engine reads text alone, and the request has images, films or sounds: use generation.engine=hf"
            )
        if settings.stop and self._decode is None:
            raise GenerationError("stop: this engine knows no text, only tokens")
        if request.adapter not in (None, *self.choices):
            among = f"choose from {', '.join(self.choices)}" if self.choices else "this model is one whole"
            raise GenerationError(f"adapter: there is no {request.adapter!r}; {among}")
        room = settings.max_new_tokens
        if settings.max_length is not None:
            room = min(room, settings.max_length - length)
        if room <= 0:
            raise GenerationError(
                f"the prompt has {length} tokens, and max_length={settings.max_length} leaves no room"
            )
        if self.context_length is not None:
            room = min(room, self.context_length - length)
        if room <= 0:
            raise GenerationError(
                f"the prompt has {length} tokens, and the model's context of {self.context_length} leaves no room"
            )
        return room

    @abstractmethod
    def _beams(self, request: Request) -> Generation:
        """The answer of a beam search. Raises GenerationError where this engine has none."""

    # ---- one request, one stream, many

    def generate(
        self, prompts: Sequence[Sequence[int]], settings: GenerationSettings, adapter: str | None = None
    ) -> list[Generation]:
        """The answer to each prompt, in order. Raises GenerationError for a prompt that leaves no room."""
        requests = [Request(tuple(prompt), settings, adapter) for prompt in prompts]
        answers = dict(self.answers(requests))
        return [answers[number] for number in range(len(requests))]

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[int, Generation]]:
        """The number of each request and its answer, as they are finished.

        Prompts of like length are read together, so that little is padded. Raises GenerationError before the first
        answer where a request cannot be held.
        """
        for request in requests:
            self.limit(request)
        order = sorted(range(len(requests)), key=lambda number: len(requests[number].prompt))
        alone = [number for number in order if requests[number].settings.num_beams > 1]
        tickets = {self.submit(requests[number]): number for number in order if number not in set(alone)}
        try:
            while tickets:
                for event in self.step():
                    if event.end is not None and event.ticket in tickets:
                        yield tickets.pop(event.ticket), event.end
        finally:
            for ticket in tickets:
                self.cancel(ticket)
        for number in alone:
            yield number, self._beams(requests[number])

    def stream(self, request: Request) -> Iterator[Event]:
        """The tokens of one answer as they come; the last event has its end."""
        if request.settings.num_beams > 1:
            end = self._beams(request)
            for choice in end.choices[:-1]:
                yield Event(-1, choice)
            yield Event(-1, end.choices[-1] if end.choices else None, end)
            return
        ticket, ended = self.submit(request), False
        try:
            while not ended:
                for event in self.step():
                    if event.ticket == ticket:
                        ended = event.end is not None
                        yield event
        finally:
            if not ended:
                self.cancel(ticket)
