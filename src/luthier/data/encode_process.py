"""One of several processes that encode: what `workers` starts, and the messages and files between them."""

from __future__ import annotations

import gc
import pickle
import signal
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow as pa

from luthier.data.cache import CountedPart
from luthier.data.row_batches import EncodeBatch, EncodedBatch
from luthier.data.table import write_batches

MANY_OBJECTS = (100_000, 10, 10)
"""After so many new objects garbage is searched for, while rows are encoded (`gc.set_threshold`)."""


@dataclass(frozen=True, slots=True)
class Task:
    """A batch to encode, which is in a file."""

    number: int
    file: str


@dataclass(frozen=True, slots=True)
class Done:
    """A batch that is encoded: its samples are in a file, of each part so many record batches."""

    number: int
    file: str
    counted: list[tuple[int, Any]]
    columns: tuple[str, ...]
    rows: int


@dataclass(frozen=True, slots=True)
class Failed:
    """A batch that could not be encoded, and why."""

    number: int
    error: Exception


def written(file: Path, value: Any) -> str:
    """The value as a file of its own, for `loaded`."""
    with file.open("wb") as stream:
        pickle.dump(value, stream, protocol=pickle.HIGHEST_PROTOCOL)
    return str(file)


def read_batch(done: Done) -> EncodedBatch:
    """What another process made of a batch; its file is removed, and stays readable until the samples are gone."""
    reader = pa.ipc.open_file(pa.memory_map(done.file))
    Path(done.file).unlink()
    batches = iter([reader.get_batch(k) for k in range(reader.num_record_batches)])
    parts = [CountedPart([next(batches) for _ in range(count)], state) for count, state in done.counted]
    return EncodedBatch(parts, done.columns, done.rows)


def main(descriptor: int, work: str) -> None:
    """Encode what comes through the connection until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it
    connection = Connection(descriptor)
    with Path(work).open("rb") as stream:
        encode: EncodeBatch = pickle.load(stream)
    gc.freeze()  # what is loaded by now stays
    gc.set_threshold(*MANY_OBJECTS)
    try:
        connection.send(None)
        while True:
            connection.send(_answered(connection.recv(), encode))
    except (EOFError, OSError):
        sys.exit()  # the process that started this one has ended


def _answered(task: Task, encode: EncodeBatch) -> Done | Failed:
    file = Path(task.file)
    try:
        with file.open("rb") as stream:
            batch = pickle.load(stream)
        file.unlink()
        encoded = encode(batch)
        made = file.with_suffix(".arrow")
        write_batches(made, (one for part in encoded.parts for one in part.batches))
    except Exception as error:  # noqa: BLE001  it is raised where the batches are put together
        return Failed(task.number, _sendable(error))
    counted = [(len(part.batches), part.counted) for part in encoded.parts]
    return Done(task.number, str(made), counted, encoded.columns, encoded.rows)


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  an exception may need anything to be made anew
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
