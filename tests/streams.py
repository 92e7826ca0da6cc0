"""Files to stream, and streams of them without a model: a row is encoded as its number."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from luthier.data.batching import RowsRule, TokensRule
from luthier.data.prepare import Preparation
from luthier.data.registry import resolve_datasets
from luthier.data.row_stream import StreamOrder, StreamSet
from luthier.data.streaming import Block, Packing, SampleStream, Windows
from luthier.recipe.mixture import MixSpec
from luthier.recipe.schema import DataSpec
from luthier.trainer.stream_steps import StepRule, StreamSteps
from luthier.types import Batch
from tests.numbered import Numbers

THREE_ROWS = RowsRule(3)
NUMBERS = Numbers()


def write_lines(file: Path, num_rows: int, name: str = "") -> Path:
    """One document a line, whose words say which it is."""
    file.write_text(
        "".join(json.dumps({"text": f"{name}{i}"}) + "\n" for i in range(num_rows)), encoding="utf-8"
    )
    return file


def sets_of(*files: Path, skipped: int = 0, limit: int | None = None) -> list[StreamSet]:
    spec = DataSpec(
        train=tuple({"file_name": str(file), "columns": {"prompt": "text"}} for file in files),  # type: ignore[arg-type]
    )
    return [StreamSet(attr, skipped, limit) for attr in resolve_datasets(spec.train, spec)]


def stream_of(
    sets: list[StreamSet],
    *,
    buffer: int = 1,
    seed: int = 0,
    mix: MixSpec | None = None,
    packing: Packing = "no",
    workers: int = 1,
    encode: Numbers = NUMBERS,
    max_length: int = 16,
) -> SampleStream:
    template: Any = SimpleNamespace(begin_ids=(), reasoning=_Unreasoned(), opener=None)
    how = Preparation(encode, template, "text", {}, seed)
    return SampleStream(
        StreamOrder(sets, mix or MixSpec(), seed, buffer), how, max_length, packing, workers=workers
    )


def collate(samples: Any) -> Any:
    """In place of a batch: data set, row and tokens of each sample."""
    return [(sample.source, sample.index, tuple(sample.input_ids.tolist())) for sample in samples]


def steps_of(
    stream: SampleStream,
    batch: RowsRule | TokensRule = THREE_ROWS,
    *,
    max_steps: int = 10**6,
    rank: int = 0,
    num_processes: int = 1,
    exchange: Callable[[Block], list[Block]] = lambda block: [block],
    max_lost: float | None = None,
    tokens_per_pass: int | None = None,
) -> StreamSteps:
    def windows(stream: SampleStream, state: dict[str, Any] | None) -> Windows:
        return Windows(stream, state, rank=rank, num_processes=num_processes, exchange=exchange)

    rule = StepRule(batch, num_processes, tokens_per_pass, False, lambda shapes: None, max_lost)
    return StreamSteps(stream, rule, collate, rank=rank, max_steps=max_steps, windows=windows)


def taken(steps: StreamSteps, first: int, count: int) -> Iterator[list[Any]]:
    """What is in each of `count` steps."""
    for step in range(first, first + count):
        batches: list[Batch] = steps[step]
        yield [sample for batch in batches for sample in batch]  # type: ignore[attr-defined]


class Together:
    """Processes of a run as threads of one: each calls `exchange` for its own block."""

    def __init__(self, count: int) -> None:
        self._blocks: list[Block | None] = [None] * count
        self._barrier = threading.Barrier(count, timeout=60)

    def exchange_of(self, rank: int) -> Callable[[Block], list[Block]]:
        def exchange(block: Block) -> list[Block]:
            self._blocks[rank] = block
            self._barrier.wait()
            found = list(self._blocks)
            self._barrier.wait()
            return found  # type: ignore[return-value]

        return exchange


class _Unreasoned:
    """In place of a template's: rows of text have no reasoning."""

    def split_row(self, row: Any) -> Any:
        return row
