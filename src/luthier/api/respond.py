"""A request in the queue -> the HTTP response, whole or streamed; who leaves gives up the place."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse

from luthier.api.answers import Answer
from luthier.api.faults import ApiError
from luthier.api.metrics import Metrics
from luthier.api.shapes import Shape
from luthier.api.worker import Asker
from luthier.types import TokenChoice

_GONE = 499
"""Nginx's status for an asker who left; nobody reads it but the metrics."""


class Stream(StreamingResponse):  # type: ignore[misc]
    """Server-sent events. The answers' places are free when it ends, whatever ended it."""

    def __init__(self, asker: Asker, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._asker = asker

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self._asker:
            await super().__call__(scope, receive, send)


class Counted:
    """What a request costs. `prompt`: its tokens, each prompt once."""

    def __init__(self, metrics: Metrics, prompt: int) -> None:
        self._metrics, self._prompt = metrics, prompt
        self._began: float | None = time.perf_counter()
        metrics.prompt_tokens += prompt

    def token(self, choice: TokenChoice | None) -> None:
        """One token has come."""
        if self._began is not None:
            self._metrics.first_token.observe(time.perf_counter() - self._began)
            self._began = None
        self._metrics.completion_tokens += choice is not None

    def usage(self, answers: Sequence[Answer]) -> dict[str, int]:
        """The counts as the API has them; a stop token is not counted, because it is not answered."""
        done = sum(len(answer.end.choices) for answer in answers if answer.end is not None)
        return {"prompt_tokens": self._prompt, "completion_tokens": done, "total_tokens": self._prompt + done}


async def whole(
    asker: Asker, answers: Sequence[Answer], shape: Shape, counted: Counted, http: HttpRequest
) -> Response:
    """All answers in one object. Raises ApiError where one cannot be completed."""
    with asker:
        work = asyncio.create_task(_collect(asker, answers, counted))
        gone = asyncio.create_task(_gone(http))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not work.done():
                work.cancel()
        if work.cancelled() or not work.done():
            return Response(status_code=_GONE)
        work.result()
    return JSONResponse(shape.whole(answers, counted.usage(answers)))


async def _collect(asker: Asker, answers: Sequence[Answer], counted: Counted) -> None:
    while asker.waits:
        step = await asker.next()
        counted.token(step.event.choice)
        answers[step.number].take(step.event)


async def _gone(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def streamed(asker: Asker, answers: Sequence[Answer], shape: Shape, counted: Counted) -> Response:
    """The answers as they grow."""
    return Stream(asker, _events(asker, answers, shape, counted))


async def _events(
    asker: Asker, answers: Sequence[Answer], shape: Shape, counted: Counted
) -> AsyncIterator[str]:
    openings = [shape.opening(answer.index) for answer in answers]
    for opening in openings:
        if opening is not None:
            yield _data(shape.chunk([opening]))
    unsaid: list[list[TokenChoice]] = [[] for _ in answers]
    try:
        while asker.waits:
            step = await asker.next()
            answer, tokens = answers[step.number], unsaid[step.number]
            counted.token(step.event.choice)
            new = answer.take(step.event)
            if step.event.choice is not None:
                tokens.append(step.event.choice)
            # Tokens whose text is held back are told with the text that comes next.
            if (
                new.content
                or new.reasoning
                or new.calls
                or (answer.end is not None and tokens and shape.logprobs)
            ):
                yield _data(shape.chunk([shape.piece(answer.index, new, tokens)]))
                tokens.clear()
            if answer.end is not None:
                yield _data(shape.chunk([shape.closing(answer)]))
    except ApiError as error:
        yield _data(error.body)
    else:
        if shape.with_usage:
            yield _data(shape.chunk([], counted.usage(answers)))
    yield "data: [DONE]\n\n"


def _data(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
