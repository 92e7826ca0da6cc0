"""Optimizer steps that are made of a stream, one after the other: which samples, and where the stream then is.

A step takes the next units in their order: as many as the rows rule says, or as fit into its tokens. An epoch of the
stream ends with a smaller step, as one of a table does. What a checkpoint keeps is the state of the stream where the
window of the next unit begins, and how many units of it are used up: that window is tokenized again, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import TrainingArguments

from luthier.data.batching import EpochPlan, Lengths, RowsRule, TokensRule
from luthier.data.report import DataReport, ReportBuilder, check_max_lost
from luthier.data.streaming import SampleStream, Shapes, Window, Windows
from luthier.trainer.steps import StepDataset, idle
from luthier.types import Batch, CheckpointError, Sample

JUDGED_AFTER = 1000
"""Rows of a set after which `data.max_lost` is asked for the first time; from then on with every window."""
_KEPT = 4
"""Steps whose position is remembered: a checkpoint is of the last one."""

OpenWindows = Callable[[SampleStream, "dict[str, Any] | None"], Windows]


@dataclass(frozen=True, slots=True)
class StepRule:
    """How units become steps and passes. `sizes` are what samples take of a pass where that is not their length."""

    batch: RowsRule | TokensRule
    world_size: int
    tokens_per_pass: int | None
    padded: bool
    sizes: Callable[[Shapes], Lengths | None]
    max_lost: float | None


class StreamSteps(StepDataset):
    """Item i is step i of the run: they are asked for in their order, from the one on where the run begins."""

    def __init__(
        self,
        stream: SampleStream,
        rule: StepRule,
        collate: Callable[[Sequence[Sample]], Batch],
        *,
        rank: int,
        max_steps: int,
        windows: OpenWindows,
    ) -> None:
        self.num_samples, self.epoch, self._length = max_steps, 0, max_steps
        self.sources = tuple(stream.names)
        self._stream, self._rule, self._collate, self._rank = stream, rule, collate, rank
        self._open_windows = windows
        self._windows: Windows | None = None
        self._next = 0
        self._positions: dict[int, dict[str, Any]] = {}
        self._closing: set[int] = set()
        self._begin_counting(None)
        self._window: Window | None = None
        self._used = 0
        self._last: tuple[int, list[list[Sample]]] | None = None

    # ---- what the loop asks ------------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        """Nothing: an epoch of the loop is the whole run, and the stream counts its own."""

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, step: int) -> list[Batch]:
        if not 0 <= step < self._length:
            raise IndexError(step)
        if step != self._next:
            raise RuntimeError(f"step {step} of a stream was asked for, and the next one is {self._next}")
        micro_batches = self._take()
        self._next = step + 1
        self._last = (step, micro_batches)
        self._positions[self._next] = self._position()
        self._positions = {at: kept for at, kept in self._positions.items() if at > step - _KEPT}
        return self._passes(micro_batches)

    def again(self, step: int) -> list[Batch]:
        """The step that was given last, as it is cut now."""
        if self._last is None or self._last[0] != step:
            raise RuntimeError(f"step {step} of a stream is gone")
        return self._passes(self._last[1])

    @property
    def tokens_per_pass(self) -> int | None:
        return self._rule.tokens_per_pass

    def limit_passes(self, tokens: int) -> None:
        self._rule = replace(self._rule, tokens_per_pass=tokens)

    def ends_epoch(self, step: int) -> bool:
        """Whether the step before number `step` was the last of an epoch of the stream."""
        return step in self._closing

    # ---- checkpoints -------------------------------------------------------------------------------

    def state(self, step: int) -> dict[str, Any]:
        """Where the stream is before step `step`, as JSON values."""
        return {"stream": self._positions[step]} if step in self._positions else {}

    def begin(self, state: Mapping[str, Any] | None, step: int) -> None:
        """Go on before step `step` with what `state()` said there; at the beginning without.

        Raises CheckpointError for a checkpoint that says nothing of a stream.
        """
        self.close()
        position = None if state is None else state.get("stream")
        if position is None and step:
            raise CheckpointError(
                "the checkpoint was written without data.stream and does not say where the stream is; remove "
                "data.stream to go on with it"
            )
        self._next, self._window, self._used, self._last = step, None, 0, None
        self._positions, self._closing = {}, set()
        self._begin_counting(position)
        self._windows = self._open_windows(self._stream, None if position is None else position["rows"])
        if position is not None:
            self._positions[step] = dict(position)
            self._advance()
            self._used = position["units"]

    def close(self) -> None:
        """End reading and tokenizing; `begin` starts anew."""
        if self._windows is not None:
            self._windows.close()
            self._windows = None

    # ---- reports -----------------------------------------------------------------------------------

    def numbers(self) -> dict[str, float]:
        """For a line of the log: the epoch of the stream, its rows so far, and how many of them were lost."""
        reports = self.reports()
        return {
            "stream_epoch": 0 if self._window is None else self._window.epoch,
            "stream_rows": sum(report.rows for report in reports),
            "stream_lost": sum(report.lost_rows for report in reports),
        }

    def reports(self) -> list[DataReport]:
        """What became of the rows so far, for each data set; a row counts in every epoch anew."""
        return [builder.report() for builder in self._builders]

    def _begin_counting(self, position: Mapping[str, Any] | None) -> None:
        self._before = [None] * len(self._stream.names) if position is None else list(position["counts"])
        self._builders = [
            ReportBuilder(name, counts) for name, counts in zip(self._stream.names, self._before, strict=True)
        ]

    def _count(self, window: Window) -> None:
        self._before = [builder.state() for builder in self._builders]
        for number, index, encoded in window.rows:
            self._builders[number].add(index, encoded)
        if self._rule.max_lost is not None:
            judged = [report for report in self.reports() if report.rows >= JUDGED_AFTER or window.ends_epoch]
            check_max_lost(judged, self._rule.max_lost)

    # ---- steps -------------------------------------------------------------------------------------

    def _advance(self) -> Window:
        """The next window. Its rows are counted here."""
        if self._windows is None:
            self.begin(None, 0)
        assert self._windows is not None
        self._window, self._used = next(self._windows), 0
        self._count(self._window)
        self.epoch = self._window.epoch
        return self._window

    def _position(self) -> dict[str, Any]:
        assert self._window is not None
        return {"rows": self._window.state, "units": self._used, "counts": self._before}

    def _ended(self) -> bool:
        """Whether no unit of this epoch is left."""
        window = self._window
        return window is not None and window.ends_epoch and self._used >= len(window.units)

    def _upcoming(self) -> Iterator[Sequence[Sample]]:
        """The units of this epoch that are not used up; to ask for one does not use it."""
        while True:
            window = self._window
            if window is None or self._used >= len(window.units):
                if self._ended():
                    return
                self._advance()
            else:
                yield window.units[self._used]

    def _take(self) -> list[list[Sample]]:
        """The samples of the next step: a list for each micro-batch (rows rule), or one list."""
        rule, taken = self._rule.batch, list[Sequence[Sample]]()
        while not taken:  # an epoch may end with rows that gave no sample
            if self._ended():
                self._advance()
            if isinstance(rule, RowsRule):
                wanted = rule.rows * rule.accumulation * self._rule.world_size
                for unit in self._upcoming():
                    taken.append(unit)
                    self._used += 1
                    if len(taken) == wanted:
                        break
            else:
                room = rule.tokens
                for unit in self._upcoming():
                    room -= sum(map(len, unit))
                    if taken and room < 0:
                        break
                    taken.append(unit)
                    self._used += 1
        if self._ended():
            self._closing.add(self._next + 1)
        rows = rule.rows if isinstance(rule, RowsRule) else len(taken)
        return [
            [sample for unit in taken[at : at + rows] for sample in unit] for at in range(0, len(taken), rows)
        ]

    def _passes(self, micro_batches: Sequence[Sequence[Sample]]) -> list[Batch]:
        """This process's passes of a step."""
        opener = self._stream.how.opener
        samples = [
            replace(sample, opener=opener) if sample.media else sample
            for batch in micro_batches
            for sample in batch
        ]
        numbers, unit = iter(range(len(samples))), list[list[int]]()
        for batch in micro_batches:
            unit.append([next(numbers) for _ in batch])
        shapes, rule = Shapes.of(samples), self._rule
        plan = EpochPlan(
            shapes.lengths,
            [unit],
            rule.batch,
            rule.world_size,
            rule.tokens_per_pass,
            rule.padded,
            rule.sizes(shapes),
        )
        return [
            self._collate([samples[index] for index in indices] or [idle(samples)])
            for indices in plan[0][self._rank]
        ]


def num_workers(steps: object, args: TrainingArguments) -> int:
    """Processes of the loader: none for a stream, whose rows are tokenized by its own."""
    return 0 if isinstance(steps, StreamSteps) else args.dataloader_num_workers


def stream_state(steps: object, step: int) -> dict[str, Any]:
    """What a checkpoint of step `step` keeps of a stream; nothing where `steps` is none."""
    return steps.state(step) if isinstance(steps, StreamSteps) else {}


def begin_stream(steps: object, state: Mapping[str, Any], step: int) -> None:
    """Begin or go on with a stream, if `steps` is one; `state` is what the checkpoint of step `step` kept."""
    if isinstance(steps, StreamSteps):
        steps.begin(state or None, step)


def stream_numbers(steps: object) -> dict[str, float]:
    """What the log says of a stream."""
    return steps.numbers() if isinstance(steps, StreamSteps) else {}


def end_stream(steps: object) -> dict[str, Any]:
    """Close a stream; what `run.json` says of it."""
    if not isinstance(steps, StreamSteps):
        return {}
    steps.close()
    return {"stream": {**steps.numbers(), "reports": [report.to_dict() for report in steps.reports()]}}
