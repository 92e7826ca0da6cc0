"""Rows of several data sets in the order in which a stream gives them: a function of the seed and of nothing else.

    StreamOrder(sets, mix, seed, buffer)     what decides the order
    RowStream(order, state)                  reads it, from its beginning or from any state on

Whose turn it is says `mixing.turns`. What comes goes into a buffer, from which the next row is drawn at random, and
what comes then takes its place. An epoch empties the buffer, and each set goes on in the next epoch where it stopped:
after its last row it begins again. Draw k of an epoch depends on seed, epoch and k alone.

A state is small and JSON: which rows are in the buffer, by their numbers, and for each set a place to read on from that
is before the oldest of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from luthier.data.mixing import turns
from luthier.data.registry import DatasetAttr
from luthier.data.seeking import Cursor, Place, Unread, open_cursor
from luthier.recipe.mixture import MixSpec
from luthier.types import DataError

_DRAWS = 1024
_MARK_EVERY = 1000
"""Rows between the places that are remembered."""


@dataclass(frozen=True, slots=True)
class StreamSet:
    """A data set of a stream: without its first `skipped` rows, and at most `limit` of those that follow."""

    attr: DatasetAttr
    skipped: int = 0
    limit: int | None = None
    cache_dir: str | None = None
    token: str | None = None

    def open(self, place: Place = None) -> Cursor:
        return open_cursor(self.attr, place, cache_dir=self.cache_dir, token=self.token)


@dataclass(frozen=True, slots=True)
class StreamOrder:
    """What decides the order of rows."""

    sets: Sequence[StreamSet]
    mix: MixSpec = field(default_factory=MixSpec)
    seed: int = 0
    buffer: int = 1

    def turns(self, epoch: int) -> Generator[int, int | None, None]:
        names = [one.attr.name for one in self.sets]
        return turns(self.mix, names, None, seed=self.seed, epoch=epoch)


@dataclass(frozen=True, slots=True)
class StreamRow:
    """A row with the number of its set, and its number `index` in that set."""

    set: int
    index: int
    row: Unread


class _Reading:
    """One data set, read again and again. `given` counts rows since the run began, `inside` those of this pass."""

    def __init__(self, source: StreamSet, mark: Sequence[Any] | None = None, size: int | None = None) -> None:
        self._source, self.size = source, size
        given, inside, place = mark or (0, 0, None)
        self.given, self.inside = int(given), int(inside)
        self.marks: deque[tuple[int, int, Place]] = deque()
        self._cursor: Cursor | None = None
        self._next: Unread | None = None
        self._begin(place)

    def _begin(self, place: Place) -> None:
        """Open the set at a place; None is its beginning."""
        self._cursor = self._source.open(place)
        if place is None:
            for _ in range(self._source.skipped):
                if self._read() is None:
                    break
        self._mark()
        self._next = self._read()
        if self._next is None and place is None:
            path, held = self._source.attr.path, self._source.skipped
            rest = f" behind the {held} that data.dev_split takes" if held else ""
            raise DataError(f"data set {self._source.attr.name!r}: {path} has no rows{rest}")

    def _read(self) -> Unread | None:
        if self._source.limit is not None and self.inside >= self._source.limit:
            return None
        assert self._cursor is not None
        return next(self._cursor, None)

    def _mark(self) -> None:
        assert self._cursor is not None
        self.marks.append((self.given, self.inside, self._cursor.place()))

    @property
    def ended(self) -> bool:
        """Whether the last row of this pass was given."""
        return self._next is None

    def take(self) -> tuple[int, int, Unread]:
        """The next row, after the number of rows given before it and its own number in the set."""
        if self._next is None:
            self.inside = 0
            self._begin(None)
        row = self._next
        assert row is not None
        number, index = self.given, self.inside + self._source.skipped
        self.given, self.inside = self.given + 1, self.inside + 1
        if self.given % _MARK_EVERY == 0:
            self._mark()
        self._next = self._read()
        if self._next is None:
            self.size = self.inside
        return number, index, row

    def mark_before(self, number: int) -> list[Any]:
        """The newest mark at or before the row `number`; older ones are forgotten."""
        while len(self.marks) > 1 and self.marks[1][0] <= number:
            self.marks.popleft()
        return list(self.marks[0])


class RowStream:
    """The rows of one epoch after the other."""

    def __init__(self, order: StreamOrder, state: dict[str, Any] | None = None) -> None:
        """From the beginning, or on from where `state()` was asked for.

        Raises DataError where a set has no rows, and where its files do not have the rows any more that a state names.
        """
        self._order = order
        self.epoch = self.emitted = 0
        self._pulled, self._done = 0, False
        self._held: list[tuple[int, StreamRow]] = []
        self._draws: list[int] = []
        self._turn: int | None
        if state is None:
            self._sets = [_Reading(one) for one in order.sets]
            self._began = [0] * len(self._sets)
            self._turns = order.turns(0)
            self._turn = self._turn_now()
        else:
            self._restore(state)
        self._fill()

    @property
    def finished(self) -> bool:
        """Whether the epoch has no row left."""
        return not self._held

    def next_epoch(self) -> None:
        self.epoch, self.emitted, self._pulled, self._done = self.epoch + 1, 0, 0, False
        self._began = [0 if one.ended else one.inside for one in self._sets]
        self._draws = []
        self._turns = self._order.turns(self.epoch)
        self._turn = self._turn_now()
        self._fill()

    def take(self) -> StreamRow:
        """The next row of the epoch, which is not finished."""
        at = self._draw(len(self._held))
        _, row = self._held[at]
        self._held[at] = self._held[-1]
        self._held.pop()
        self.emitted += 1
        self._fill()
        return row

    def _draw(self, below: int) -> int:
        if self._order.buffer == 1:
            return 0
        block, k = divmod(self.emitted, _DRAWS)
        if k == 0 or not self._draws:
            sequence = np.random.SeedSequence([self._order.seed % 2**64, self.epoch, block])
            self._draws = np.random.default_rng(sequence).integers(0, 2**32, _DRAWS).tolist()
        return self._draws[k] * below >> 32

    def _fill(self) -> None:
        while len(self._held) < self._order.buffer and self._turn is not None:
            reading = self._sets[self._turn]
            number, index, row = reading.take()
            self._held.append((number, StreamRow(self._turn, index, row)))
            self._pulled += 1
            self._turn = self._turn_after(self._turn, ended=reading.ended)

    def _turn_now(self) -> int | None:
        return self._asked(lambda: next(self._turns))

    def _turn_after(self, number: int, *, ended: bool) -> int | None:
        return self._asked(lambda: self._turns.send(number) if ended else next(self._turns))

    def _asked(self, question: Any) -> int | None:
        try:
            return int(question())
        except StopIteration:
            self._done = True
            return None

    # ---- state -------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Where the stream is, as JSON values."""
        oldest = [reading.given for reading in self._sets]
        for number, row in self._held:
            oldest[row.set] = min(oldest[row.set], number)
        marks = [reading.mark_before(number) for reading, number in zip(self._sets, oldest, strict=True)]
        return {
            "epoch": self.epoch,
            "emitted": self.emitted,
            "pulled": self._pulled,
            "done": self._done,
            "began": list(self._began),
            "given": [reading.given for reading in self._sets],
            "sizes": [reading.size for reading in self._sets],
            "marks": marks,
            "held": [[row.set for _, row in self._held], [number for number, _ in self._held]],
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.epoch, self.emitted = state["epoch"], state["emitted"]
        self._pulled, self._done, self._began = state["pulled"], state["done"], list(state["began"])
        self._sets = [
            _Reading(one, mark, size)
            for one, mark, size in zip(self._order.sets, state["marks"], state["sizes"], strict=True)
        ]
        held = list(zip(*state["held"], strict=True))
        wanted, found = set(held), dict[tuple[int, int], StreamRow]()
        for number, reading in enumerate(self._sets):
            while reading.given < state["given"][number]:
                at, index, row = reading.take()
                if (number, at) in wanted:
                    found[number, at] = StreamRow(number, index, row)
            if reading.size != state["sizes"][number]:
                raise DataError(
                    f"data set {self._order.sets[number].attr.name!r}: {self._order.sets[number].attr.path} is "
                    "not what it was when the checkpoint was written: it has another number of rows"
                )
        self._held = [(at, found[number, at]) for number, at in held]
        self._turns = self._order.turns(self.epoch)
        self._turn = None if self._done else self._turn_again(sizes=state["sizes"])

    def _turn_again(self, sizes: Sequence[int | None]) -> int | None:
        """Whose turn it is now, asked for as often as it was in this epoch; no row is read for that."""
        if len(sizes) == 1 and self._order.mix.is_plain:
            return self._turn_now()
        inside, turn = list(self._began), self._turn_now()
        for _ in range(self._pulled):
            assert turn is not None
            inside[turn] += 1
            if ended := inside[turn] == sizes[turn]:
                inside[turn] = 0
            turn = self._turn_after(turn, ended=ended)
        return turn
