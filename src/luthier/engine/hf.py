"""Generation over transformers: prompts as token ids in, answers as token ids out; nothing of training."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from typing import Any

import psutil
import torch
from peft import PeftModel
from torch import nn

from luthier.engine.beams import search_beams
from luthier.engine.choosing import Chooser
from luthier.engine.key_values import bytes_per_token
from luthier.engine.lane import Lane, Row
from luthier.engine.packed import PackedCopies, copies_for
from luthier.engine.protocol import BASE, Decode, Engine
from luthier.engine.selftest import answers_together
from luthier.generation import Event, Generation, GenerationError, Request
from luthier.types import ModelError

_SHARE = 0.5
"""Of the free memory, the part that keys and values may take where no bound is given."""


class HfEngine(Engine):
    """Answers on a loaded model, with or without adapters, many rows at a time.

    rows: the most that are answered at once. memory: bytes that their keys and values may take; half of what is free
    where absent. decode: tokens to text, for stop strings. adapters: names, of those attached, that requests may
    choose; the first is the default. None: the model as it is. pack: `answers` uses packed copies of the weights, made
    anew at each call, where this machine has such and the memory for them; see `engine.packed`.

    Raises ModelError for `pack` with several adapters to choose from.
    """

    reads_media = True

    def __init__(
        self,
        model: nn.Module,
        *,
        rows: int = 8,
        memory: int | None = None,
        decode: Decode | None = None,
        adapters: Sequence[str] = (),
        pack: bool = False,
    ) -> None:
        if pack and adapters:
            raise ModelError("pack: copies of the weights are of one adapter; leave out adapters, or pack")
        self.model = model
        self._pack = pack
        self._copies: PackedCopies | None = None
        self._inner: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
        config: Any = self._inner.config
        length: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
        super().__init__(adapters, length, decode)
        self._rows = rows
        self._memory = memory
        self._together: bool | None = None
        self._tickets = count()
        self._waiting: deque[Row] = deque()
        self._lanes: dict[str | None, Lane] = {}

    @property
    def rows(self) -> int:
        """The most that are answered at once."""
        return self._rows

    @property
    def choices(self) -> tuple[str, ...]:
        """The names that a request may have as its adapter; none where adapters are merged, or there are none."""
        return (*self.adapters, BASE) if isinstance(self.model, PeftModel) else self.adapters

    # ---- for who keeps the loop

    def submit(self, request: Request) -> int:
        """Put a request behind those that wait; its ticket is in the events of `step`.

        Raises GenerationError for one that cannot be held, or that wants beams.
        """
        if request.settings.num_beams > 1:
            raise GenerationError("num_beams: beams are searched one prompt at a time, not among others")
        chooser = Chooser(request.settings, request.prompt)
        row = Row(next(self._tickets), request, self.limit(request), chooser)
        self._waiting.append(row)
        return row.ticket

    @property
    def busy(self) -> bool:
        """Whether any request waits or is under way."""
        return bool(self._waiting) or any(len(lane) for lane in self._lanes.values())

    @property
    def waiting(self) -> int:
        """Requests that wait for room."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests under way."""
        return sum(len(lane) for lane in self._lanes.values())

    def cancel(self, ticket: int) -> Generation | None:
        """Forget a request, and free its room; what it had, or None where it was finished before."""
        for row in self._waiting:
            if row.ticket == ticket:
                self._waiting.remove(row)
                return row.ended("cancelled")
        ends = (lane.cancel(ticket) for lane in self._lanes.values())
        return next((end for end in ends if end is not None), None)

    def abandon(self) -> list[int]:
        """Forget all that is under way, after a step that raised; the tickets of those that still wait."""
        self._lanes.clear()
        return [row.ticket for row in self._waiting]

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One token for every row under way, those that come in now among them."""
        events: list[Event] = []
        with _evaluating(self.model):  # nothing to do where `answers` has done it for all steps
            if self._together is None:
                self._together = self._rows > 1 and answers_together(self._inner)
            new = self._next_rows()
            for name, lane in list(self._lanes.items()):
                with self._active(name):
                    if len(lane):
                        events += lane.step()
            for name, rows in new.items():
                lane = self._lanes.setdefault(name, Lane(self._inner, self._decode, together=self._together))
                with self._active(name):
                    events += lane.admit(rows)
        return events

    def _next_rows(self) -> dict[str | None, list[Row]]:
        """Those that wait and fit, by adapter."""
        new: dict[str | None, list[Row]] = {}
        most = self._rows if self._together else 1
        running = self.running
        longest = max((lane.longest for lane in self._lanes.values()), default=0)
        while self._waiting and running < most:
            row = self._waiting[0]
            longest = max(longest, len(row.request.prompt) + row.limit)
            if running and (running + 1) * longest > self._cache_tokens():
                break
            new.setdefault(row.request.adapter, []).append(self._waiting.popleft())
            running += 1
        return new

    def _cache_tokens(self) -> int:
        if self._memory is None:
            device = next(self._inner.parameters()).device
            free = (
                torch.cuda.mem_get_info(device)[0]
                if device.type == "cuda"
                else psutil.virtual_memory().available
            )
            self._memory = int(free * _SHARE)
        return self._memory // bytes_per_token(self._inner.config, next(self._inner.parameters()).dtype)  # type: ignore[arg-type]

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[int, Generation]]:
        with _evaluating(self.model):
            self._copies = copies_for(self._inner) if self._pack else None
            try:
                yield from super().answers(requests)
            finally:
                self._copies = None

    def _active(self, name: str | None) -> AbstractContextManager[Any]:
        if name is None and self._copies is not None:
            return self._copies.in_place()
        if name == BASE and isinstance(self.model, PeftModel):
            return self.model.disable_adapter()
        chosen = name if name is not None else next(iter(self.adapters), None)
        if chosen is not None and chosen != BASE and isinstance(self.model, PeftModel):
            self.model.set_adapter(chosen, inference_mode=True)
        return nullcontext()

    def _beams(self, request: Request) -> Generation:
        with _evaluating(self.model), self._active(request.adapter):
            return search_beams(self._inner, request, self.limit(request), self._decode)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and its like; afterwards every module is as it was, those that were not training too."""
    training = [module for module in model.modules() if module.training] if model.training else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
