"""Batches of rows through one process or several, in their order.

    encode_batches(encode, batches, processes, folder)   -> what became of each batch

This process is one of them. It begins alone, and starts the others where there is so much to do that it would still
be busy after they have started; so a small data set costs no start. Each of the others is a plain Python that imports
what reads rows and tokenizes, and neither torch nor the main script: it starts in about a second, with a main script
that has no guard, too, and beside running threads, which a fork would not survive. Rows and samples go through files
in `folder`; what goes through the connection is small, so nobody waits for anybody to read.
"""

from __future__ import annotations

import gc
import logging
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path

from luthier.data.encode_process import MANY_OBJECTS, Done, Failed, Task, read_batch, written
from luthier.data.row_batches import EncodeBatch, EncodedBatch, RowBatch
from luthier.types import DataError

log = logging.getLogger("luthier.data")

_ALONE = 0.5
"""Seconds of work after which the other processes are started."""
_AHEAD = 2
"""Batches that a process holds, so that it has the next one when it has done one."""

_BEGIN = "import sys; sys.path[:] = {path!r}; from luthier.data.encode_process import main; main({arguments})"


def encode_batches(
    encode: EncodeBatch, batches: Iterator[RowBatch], processes: int, folder: Path
) -> Iterator[EncodedBatch]:
    """What became of each batch, in their order; by `processes` processes, this one among them.

    Raises what `encode` raises, wherever it ran, for the first batch that fails, and DataError naming the rows of a
    process that died. Whatever ends this, an interruption among it, the other processes end with it. Only this process
    works where there are no pipes to pass on (Windows).
    """
    with _old_objects_at_rest():
        if processes <= 1 or os.name != "posix":
            yield from map(encode, batches)
            return
        team = _Team(encode, folder, processes - 1)
        try:
            yield from team.run(batches)
        finally:
            team.close()


@contextmanager
def _old_objects_at_rest() -> Iterator[None]:
    """Search less for garbage in cycles, of which rows make none: not among what exists now (imported libraries are a
    million objects), and only where much was made."""
    before = gc.get_threshold()
    gc.set_threshold(*MANY_OBJECTS)
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)


@dataclass(slots=True)
class _Worker:
    """Another process, and the batches that it holds by their numbers."""

    process: subprocess.Popen[bytes]
    connection: Connection
    ready: bool = False
    held: dict[int, RowBatch] = field(default_factory=dict)


class _Team:
    """This process and `others` more."""

    def __init__(self, encode: EncodeBatch, folder: Path, others: int) -> None:
        self._encode, self._folder, self._others = encode, folder, others
        self._workers: list[_Worker] = []
        self._results: dict[int, EncodedBatch | Failed] = {}

    def run(self, batches: Iterator[RowBatch]) -> Iterator[EncodedBatch]:
        numbered = enumerate(batches)
        began, wanted, more = time.monotonic(), 0, True
        most = 2 * _AHEAD * (self._others + 1)
        while True:
            self._receive(block=False)
            while wanted in self._results:
                yield _result(self._results.pop(wanted))
                wanted += 1
            if not self._workers and time.monotonic() - began > _ALONE and self._others:
                self._start()
            taken = wanted + len(self._results) + sum(len(worker.held) for worker in self._workers)
            following = next(numbered, None) if more and taken - wanted < most else None
            if following is not None:
                self._take(*following)
            elif any(worker.held for worker in self._workers):
                self._receive(block=True)
            elif not self._results:
                return
            more &= following is not None or taken - wanted >= most

    def _take(self, number: int, batch: RowBatch) -> None:
        """Give a batch to a process that has room for it; where none has, encode it here."""
        free = [worker for worker in self._workers if worker.ready and len(worker.held) < _AHEAD]
        if free:
            worker = min(free, key=lambda one: len(one.held))
            task = Task(number, written(self._folder / f"{number}.rows", batch))
            worker.held[number] = batch
            with suppress(OSError):  # it has died: `_receive` finds that out
                worker.connection.send(task)
            return
        try:
            self._results[number] = self._encode(batch)
        except Exception as error:  # noqa: BLE001  it is raised when its turn comes
            self._results[number] = Failed(number, error)

    def _receive(self, *, block: bool) -> None:
        """Take what the others have sent."""
        connections = {worker.connection: worker for worker in self._workers}
        for connection in wait(list(connections), None if block else 0):
            worker = connections[connection]  # type: ignore[index]  # only connections were given
            try:
                found = worker.connection.recv()
            except (EOFError, OSError):
                self._died(worker)
                continue
            if isinstance(found, Done):
                del worker.held[found.number]
                self._results[found.number] = read_batch(found)
            elif isinstance(found, Failed):
                worker.held.pop(found.number)
                self._results[found.number] = found
            else:
                worker.ready = True

    def _died(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.connection.close()
        code = worker.process.wait()
        how = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
        if not worker.held:
            log.warning("a process that was to tokenize %s before it began; the others go on without it", how)
            self._others -= 1
            return
        rows = " and ".join(batch.named() for batch in worker.held.values())
        raise DataError(
            f"data set {self._encode.attr.name!r}: a process that tokenizes {how} with {rows}; where memory was "
            "short, lower data.workers"
        )

    def _start(self) -> None:
        try:
            work = pickle.dumps(self._encode)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            log.warning("one process tokenizes, as the work cannot be sent to others: %s", error)
            self._others = 0
            return
        if b"__main__" in work:
            log.warning("one process tokenizes, as a part of the work is defined in the main script")
            self._others = 0
            return
        file = written(self._folder / "work", self._encode)
        self._workers = [_started(file) for _ in range(self._others)]

    def close(self) -> None:
        """End the others, at once."""
        for worker in self._workers:
            worker.connection.close()
            worker.process.kill()
        for worker in self._workers:
            worker.process.wait()


def _started(work: str) -> _Worker:
    ours, theirs = Pipe()
    code = _BEGIN.format(path=sys.path, arguments=f"{theirs.fileno()}, {work!r}")
    # one thread each: the processes share the cores
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            env=environment,
            pass_fds=(theirs.fileno(),),
        )
    return _Worker(process, ours)


def _result(found: EncodedBatch | Failed) -> EncodedBatch:
    if isinstance(found, Failed):
        raise found.error
    return found
