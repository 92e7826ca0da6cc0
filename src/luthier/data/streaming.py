"""Samples that are read and tokenized while a model is trained: one logical stream, whoever does the work.

    rows -> blocks -> samples -> windows of units

A *block* is so many rows of an epoch, one after the other; it is what one process tokenizes at once. A *window* is one
block, or where samples are packed as many as are packed together; its *units* are samples, or packed groups of them.
What is in a window depends on the order of rows alone, so neither the number of workers nor that of processes changes
it: the processes of a run tokenize blocks in turns, and all of them exchange what they have.
"""

from __future__ import annotations

import pickle
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from luthier.data.encode import blocks
from luthier.data.encode_raw import encode_raw
from luthier.data.packing import best_fit, greedy_groups
from luthier.data.partners import Mismatched
from luthier.data.read import RawRow
from luthier.data.row_stream import RowStream, StreamOrder, StreamRow
from luthier.types import DataError, Encoded, LuthierError, Sample

if TYPE_CHECKING:
    from luthier.data.prepare import Preparation

BLOCK = 250
PACKED_BLOCKS = 4
"""Blocks that are packed together: 1000 rows, as many as LLaMA-Factory packs together."""

Packing = Literal["no", "groups", "llamafactory"]
Exchange = Callable[["Block"], "list[Block]"]
"""What each process gave, in their order."""


@dataclass(frozen=True, slots=True)
class SampleStream:
    """How rows become units.

    order: of the rows. how: what turns a row into samples. max_length: of packed groups. mismatched: each sample gets
    the answer of another one of its window (kto). workers: processes that tokenize, for each process of the run; with 1
    a thread of it does.
    """

    order: StreamOrder
    how: Preparation
    max_length: int
    packing: Packing = "no"
    mismatched: bool = False
    workers: int = 1

    @property
    def names(self) -> list[str]:
        return [one.attr.name for one in self.order.sets]


@dataclass(slots=True)
class Block:
    """Some rows of an epoch, tokenized: number of the set, row and what became of it. `state` is where the stream was
    before the first row, if a window begins there; `closes` says that a window ends with it, `ends_epoch` an epoch."""

    rows: list[tuple[int, int, Encoded]] = field(default_factory=list)
    state: dict[str, Any] | None = None
    closes: bool = False
    ends_epoch: bool = False
    error: LuthierError | None = None
    """Raised where the block is used, on every process."""


@dataclass(frozen=True, slots=True)
class Window:
    """Units, each some samples that share a row; `rows` is what became of each row."""

    state: dict[str, Any]
    units: Sequence[Sequence[Sample]]
    rows: Sequence[tuple[int, int, Encoded]]
    ends_epoch: bool

    @property
    def epoch(self) -> int:
        return int(self.state["epoch"])


@dataclass(frozen=True, slots=True)
class _EncodeRows:
    """Rows of a block -> samples; a value that other processes can be sent."""

    stream: SampleStream

    def __call__(self, rows: Sequence[StreamRow]) -> list[tuple[int, int, Encoded]]:
        return [(row.set, row.index, self._encoded(row)) for row in rows]

    def _encoded(self, one: StreamRow) -> Encoded:
        how, attr = self.stream.how, self.stream.order.sets[one.set].attr
        raw = RawRow(one.index, one.row.place, one.row.parsed())
        return encode_raw(raw, attr, how)


def encode_rows(stream: SampleStream, rows: Sequence[StreamRow]) -> list[tuple[int, int, Encoded]]:
    """What becomes of each row, with the number of its set and its own. Raises DataError for one that is unreadable."""
    return _EncodeRows(stream)(rows)


class Windows(Iterator[Window]):
    """The windows of a stream, epoch after epoch without an end, from its beginning or from a state on.

    `rank` of `num_processes` reads all rows and tokenizes its share of the blocks; `exchange` is called by all of them
    in the same order. Raises DataError for rows that cannot be read, and where an epoch gives no sample at all.
    """

    def __init__(
        self,
        stream: SampleStream,
        state: dict[str, Any] | None = None,
        *,
        rank: int = 0,
        num_processes: int = 1,
        exchange: Exchange = lambda block: [block],
    ) -> None:
        self._stream, self._exchange = stream, exchange
        self._own = _Tokenizing(stream, state, rank, num_processes)
        self._ready: list[Block] = []
        self._found = False

    def __next__(self) -> Window:
        taken: list[Block] = []
        while not (taken and taken[-1].closes):
            if not self._ready:
                self._ready = self._exchange(self._own.next())
            taken.append(self._ready.pop(0))
            if (error := taken[-1].error) is not None:
                self.close()
                raise error
        window = self._window(taken)
        self._found |= bool(window.units)
        if window.ends_epoch:
            if not self._found:
                self.close()
                raise DataError(
                    f"nothing to train on: no row of {', '.join(self._stream.names)} gives a sample"
                )
            self._found = False
        return window

    def close(self) -> None:
        """End reading and tokenizing."""
        self._own.close()

    def _window(self, taken: Sequence[Block]) -> Window:
        rows = [row for block in taken for row in block.rows]
        samples: Sequence[Sample] = [sample for *_, encoded in rows for sample in encoded.samples]
        if self._stream.mismatched and samples:
            most = max(len(encoded.samples) for *_, encoded in rows)
            samples = list(Mismatched(samples, self._stream.max_length, together=most))
        assert taken[0].state is not None
        return Window(taken[0].state, units_of(self._stream, samples), rows, taken[-1].ends_epoch)


def units_of(stream: SampleStream, samples: Sequence[Sample]) -> list[list[Sample]]:
    """The samples, or the groups that packing makes of them."""
    limit, packing, how = stream.max_length, stream.packing, stream.how
    if packing == "llamafactory" and how.kind == "text":
        first_id = next(iter(how.template.begin_ids), None)
        return [[block] for block in blocks(samples, limit, first_id=first_id)]
    if packing == "no":
        return [[sample] for sample in samples]
    lengths = [len(sample) for sample in samples]
    groups = best_fit(lengths, limit) if packing == "groups" else greedy_groups(lengths, limit)
    return [[samples[i] for i in group] for group in groups]


class _Tokenizing:
    """The blocks of one process, ahead of those who use them by a few: read by a thread, tokenized by workers."""

    def __init__(
        self, stream: SampleStream, state: dict[str, Any] | None, rank: int, num_processes: int
    ) -> None:
        self._stream, self._state, self._rank, self._num = stream, state, rank, num_processes
        self._ended = threading.Event()
        self._queue: queue.Queue[tuple[Block, Future[Any] | None]] = queue.Queue(maxsize=2 * stream.workers)
        self._workers = self._executor()
        self._failure: BaseException | None = None
        self._reader = threading.Thread(target=self._read, name="stream", daemon=True)
        self._reader.start()

    def next(self) -> Block:
        while True:
            try:
                block, future = self._queue.get(timeout=1.0)
                break
            except queue.Empty:
                if self._failure is not None:
                    raise self._failure from None
        if future is not None:
            try:
                block.rows = future.result()
            except LuthierError as error:
                block.error = error
        return block

    def close(self) -> None:
        self._ended.set()
        while self._reader.is_alive():
            try:  # it may wait for room
                self._queue.get_nowait()
            except queue.Empty:
                self._reader.join(0.01)
        self._workers.shutdown(wait=True, cancel_futures=True)

    def _executor(self) -> Executor:
        # A tokenizer is not made for two threads: the one that trains saves it, so this one has its own.
        encode = pickle.dumps(_EncodeRows(self._stream))
        if self._stream.workers == 1:
            return ThreadPoolExecutor(1, initializer=_begin_work, initargs=(encode,))
        # Spawned, not forked, as a fork of a process with running threads may hang.
        context = get_context("spawn")
        return ProcessPoolExecutor(
            self._stream.workers, mp_context=context, initializer=_begin_work, initargs=(encode,)
        )

    def _read(self) -> None:
        try:
            for number, (block, rows) in enumerate(self._blocks()):
                if self._ended.is_set():
                    return
                if number % self._num == self._rank:
                    self._put(block, self._workers.submit(_work, rows))
        except LuthierError as error:
            # The block that could not be read is used by all at once, whoever's it is.
            while not self._ended.is_set():
                self._put(Block(error=error), None)
        except BaseException as error:  # noqa: BLE001  it is raised again where blocks are waited for
            self._failure = error

    def _put(self, block: Block, future: Future[Any] | None) -> None:
        while not self._ended.is_set():
            try:
                self._queue.put((block, future), timeout=0.1)
            except queue.Full:
                continue
            return

    def _blocks(self) -> Iterator[tuple[Block, list[StreamRow]]]:
        rows = RowStream(self._stream.order, self._state)
        of_window = 1 if self._stream.packing == "no" else PACKED_BLOCKS
        while True:
            if rows.finished:
                rows.next_epoch()
            begins = rows.emitted % (BLOCK * of_window) == 0
            state = rows.state() if begins else None
            taken = list[StreamRow]()
            while len(taken) < BLOCK and not rows.finished:
                taken.append(rows.take())
            closes = rows.finished or rows.emitted % (BLOCK * of_window) == 0
            yield Block(state=state, closes=closes, ends_epoch=rows.finished), taken


_OWN = threading.local()


def _begin_work(encode: bytes) -> None:
    _OWN.encode = pickle.loads(encode)


def _work(rows: list[StreamRow]) -> list[tuple[int, int, Encoded]]:
    found: list[tuple[int, int, Encoded]] = _OWN.encode(rows)
    return found


# --------------------------------------------------------------------------------------------------
# What the plan of a step wants to know of samples


@dataclass(frozen=True, slots=True)
class Shapes:
    """(n,) each, of samples: tokens, tokens of the prompt of branches, of the longest row, and number of branches."""

    lengths: np.ndarray[Any, np.dtype[np.int64]]
    prompt_lengths: np.ndarray[Any, np.dtype[np.int64]]
    row_lengths: np.ndarray[Any, np.dtype[np.int64]]
    num_branches: np.ndarray[Any, np.dtype[np.int64]]

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Shapes:
        def array(numbers: Iterator[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
            return np.fromiter(numbers, np.int64, len(samples))

        return cls(
            array(len(sample) for sample in samples),
            array(sample.branches[0] if sample.branches else 0 for sample in samples),
            array(_longest_row(sample) for sample in samples),
            array(len(sample.branches) for sample in samples),
        )


def _longest_row(sample: Sample) -> int:
    if not sample.branches:
        return len(sample)
    ends = (*sample.branches, len(sample))
    return ends[0] + int(np.diff(ends).max())
