"""One thread steps the engine; everybody else asks from the event loop.

All bookkeeping happens on the event loop. Between two steps it hands the thread what came in and what was given up, and
takes the tokens back. So nothing here is locked, and the engine is never touched by two at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from typing import TypeVar

from luthier.api.faults import ApiError, invalid, overloaded, server_error, shutting_down
from luthier.engine.protocol import Engine
from luthier.types import Event, Request

log = logging.getLogger("luthier.api")
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Step:
    """News of one answer of an asker: its number among them, and the event."""

    number: int
    event: Event


class Asker:
    """Who waits for one or several answers. Leaving it gives up what is not finished."""

    def __init__(self, worker: Worker, requests: Sequence[Request]) -> None:
        self._worker = worker
        self._news: asyncio.Queue[Step | ApiError] = asyncio.Queue()
        self._open = {worker._enter(self, request): number for number, request in enumerate(requests)}

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *_: object) -> None:
        for key in list(self._open):
            self._worker._give_up(key)
        self._open.clear()

    @property
    def waits(self) -> bool:
        """Whether any of its answers is still to come."""
        return bool(self._open) or not self._news.empty()

    async def next(self) -> Step:
        """The next token or end of any answer. Raises ApiError where the answers cannot be completed."""
        news = await self._news.get()
        if isinstance(news, ApiError):
            raise news
        return news

    def _tell(self, key: int, event: Event) -> None:
        if key not in self._open:
            return
        number = self._open[key]
        if event.end is not None:
            del self._open[key]
        self._news.put_nowait(Step(number, event))

    def _fail(self, key: int, error: ApiError) -> None:
        if self._open.pop(key, None) is not None:
            self._news.put_nowait(error)


@dataclass(slots=True)
class _Turn:
    """What the thread is to do, and what came of it. `tickets`: of requests that were taken, by key."""

    new: dict[int, Request]
    given_up: list[int]
    tickets: dict[int, int] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)

    def run(self, engine: Engine) -> None:
        for ticket in self.given_up:
            engine.cancel(ticket)
        for key, request in self.new.items():
            self.tickets[key] = engine.submit(request)
        if engine.busy:
            self.events = engine.step()


class Worker:
    """The engine's keeper. `most`: answers that wait or are under way at once; more are refused."""

    def __init__(self, engine: Engine | None, most: int) -> None:
        self._engine, self.most = engine, most
        self._keys = count()
        self._askers: dict[int, Asker] = {}
        self._new: dict[int, Request] = {}
        self._tickets: dict[int, int] = {}
        """Keys by the engine's ticket."""
        self._given_up: list[int] = []
        self._jobs = self._running = 0
        self._closed = False
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._task: asyncio.Task[None] | None = None

    # ---- what askers do

    def ask(self, requests: Sequence[Request]) -> Asker:
        """Put requests in the queue. Raises ApiError where there is no room, or the server stops."""
        self._require_room(len(requests))
        asker = Asker(self, requests)
        self._wake.set()
        return asker

    async def do(self, job: Callable[[], _Value]) -> _Value:
        """Run something else on the engine's thread, in its turn. Raises ApiError as `ask` does, and what it raises."""
        self._require_room(1)
        self._jobs += 1
        try:
            return await asyncio.wrap_future(self._thread.submit(job))
        finally:
            self._jobs -= 1

    @property
    def outstanding(self) -> int:
        """Answers that wait or are under way."""
        return len(self._askers) + self._jobs

    @property
    def running(self) -> int:
        """Answers under way."""
        return self._running + min(self._jobs, 1)

    def _require_room(self, wanted: int) -> None:
        if self._closed:
            raise shutting_down()
        if wanted > self.most:
            raise invalid(
                f"{wanted} answers at once are more than this server takes, which is {self.most}", "n"
            )
        if self.outstanding + wanted > self.most:
            raise overloaded()

    def _enter(self, asker: Asker, request: Request) -> int:
        key = next(self._keys)
        self._askers[key], self._new[key] = asker, request
        return key

    def _give_up(self, key: int) -> None:
        self._askers.pop(key, None)
        self._new.pop(key, None)
        tickets = [ticket for ticket, other in self._tickets.items() if other == key]
        for ticket in tickets:
            del self._tickets[ticket]
        self._given_up += tickets
        self._wake.set()

    # ---- the loop

    def start(self) -> None:
        """Begin to step, on the running event loop."""
        if self._engine is not None:
            self._task = asyncio.create_task(self._run(self._engine))

    async def close(self) -> None:
        """Take nothing more, and end every answer that is not complete."""
        self._closed = True
        for key, asker in list(self._askers.items()):
            asker._fail(key, shutting_down())
            self._give_up(key)

    async def stop(self) -> None:
        """Close, wait for the step under way, and end the thread."""
        await self.close()
        self._wake.set()
        if self._task is not None:
            await self._task
        self._thread.shutdown()

    async def _run(self, engine: Engine) -> None:
        while not self._closed or self._askers or self._given_up:
            await self._wake.wait()
            turn = _Turn(self._new, self._given_up)
            self._new, self._given_up = {}, []
            done = asyncio.wrap_future(self._thread.submit(turn.run, engine))
            await asyncio.wait([done])
            self._taken(turn)
            error = done.exception()
            if error is not None:
                self._failed(engine, turn, error)
            for event in turn.events:
                self._dispatch(event)
            self._running = engine.running
            if not (engine.busy or self._new or self._given_up or self._closed):
                self._wake.clear()

    def _taken(self, turn: _Turn) -> None:
        for key, ticket in turn.tickets.items():
            if key in self._askers:
                self._tickets[ticket] = key
            else:  # given up while the step ran
                self._given_up.append(ticket)

    def _dispatch(self, event: Event) -> None:
        key = self._tickets.get(event.ticket)
        if key is None:
            return
        asker = self._askers[key]
        if event.end is not None:
            del self._tickets[event.ticket], self._askers[key]
        asker._tell(key, event)

    def _failed(self, engine: Engine, turn: _Turn, error: BaseException) -> None:
        """A step went wrong: those in it fail, those that wait go on, and the engine begins anew."""
        log.error("a step failed: %s", type(error).__name__, exc_info=error)
        waiting = set(engine.abandon())
        lost = {key for ticket, key in self._tickets.items() if ticket not in waiting}
        lost |= turn.new.keys() - turn.tickets.keys()
        for key in lost & self._askers.keys():
            self._askers.pop(key)._fail(
                key, server_error("the engine failed while it answered; see the server's log")
            )
        self._tickets = {ticket: key for ticket, key in self._tickets.items() if key not in lost}
