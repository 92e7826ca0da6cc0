"""An engine that says what it is told to, token by token, in the place of a model's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from luthier.answering import Answerer
from luthier.engine.protocol import Engine
from luthier.types import Event, Generation, Request, TokenChoice


class ScriptedEngine(Engine):
    """Answers every request with the next of some texts, which it tokenizes as the answers of training; `asked` are
    the prompts' texts."""

    def __init__(self, answerer: Answerer, texts: Sequence[str]) -> None:
        super().__init__((), None, answerer.template.decode)
        self._template, self._texts = answerer.template, iter(texts)
        self._open: dict[int, tuple[Iterator[int], list[TokenChoice]]] = {}
        self.asked: list[str] = []

    rows = property(lambda self: 4)
    choices = property(lambda self: ())
    busy = property(lambda self: bool(self._open))
    waiting = property(lambda self: 0)
    running = property(lambda self: len(self._open))

    def submit(self, request: Request) -> int:
        self.asked.append(self._template.decode(request.prompt))
        ids = self._template.tokenizer(next(self._texts), add_special_tokens=False)["input_ids"]
        self._open[len(self.asked)] = (iter(ids), [])
        return len(self.asked)

    def step(self) -> list[Event]:
        events = []
        for ticket, (ids, said) in list(self._open.items()):
            token = next(ids, None)
            if token is None:
                del self._open[ticket]
                events.append(Event(ticket, None, Generation(tuple(said), "stop")))
            else:
                said.append(TokenChoice(token))
                events.append(Event(ticket, said[-1]))
        return events

    def cancel(self, ticket: int) -> Generation | None:
        found = self._open.pop(ticket, None)
        return Generation(tuple(found[1]), "cancelled") if found else None

    def abandon(self) -> list[int]:
        self._open.clear()
        return []

    def _beams(self, request: Request) -> Generation:
        raise NotImplementedError("a script has no beams")
