"""The processes that train one model together: what each of them takes, and what all of them know."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from operator import add
from typing import Any, TypeVar

import torch.distributed
from transformers import TrainingArguments

from luthier.types import LuthierError

Item = TypeVar("Item")


class ProcessError(LuthierError):
    """Another process of the run failed; its own error is on its own output."""


@dataclass(frozen=True, slots=True)
class Processes:
    """`count` processes as number `rank` of them sees them.

    Each method that speaks with the others has to be called by all of them, in the same order.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    """The number among those of the same machine."""
    copies: int = 1
    """How many neighbours do the same, and are one here."""

    @classmethod
    def of(cls, args: TrainingArguments) -> Processes:
        return cls(args.process_index, args.world_size, args.local_process_index)

    def with_rows(self, copies: int) -> Processes:
        """The same processes, where `copies` neighbours have the same rows, and are one."""
        return Processes(self.rank // copies, self.count // copies, self.local_rank, copies)

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes files."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part of what all have alike; `joined` puts the parts together again."""
        return items[self.rank :: self.count]

    def exchange(self, own: Item) -> list[Item]:
        """What each process gave, in their order."""
        if self.count == 1:
            return [own]
        found: list[Any] = [None] * (self.count * self.copies)
        torch.distributed.all_gather_object(found, own)
        return found[:: self.copies]

    def joined(self, own: Sequence[Item]) -> list[Item]:
        """The whole whose `share` is `own` here, on every process."""
        parts = self.exchange(list(own))
        return [parts[k % self.count][k // self.count] for k in range(sum(map(len, parts)))]

    def total(self, numbers: Iterable[float]) -> list[float]:
        """Sums over all processes, the same to the last bit on each."""
        return [sum(column) for column in zip(*self.exchange(list(numbers)), strict=True)]

    def sums(self, numbers: Mapping[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
        """Sums over all processes by name, of names that some may lack: one that had nothing to do knows none."""
        found: dict[str, tuple[float, ...]] = {}
        for part in self.exchange(dict(numbers)):
            for name, values in part.items():
                known = found.get(name)
                found[name] = values if known is None else tuple(map(add, known, values))
        return found

    def together(self, work: Callable[[], Item]) -> Item:
        """What `work` gives here, once it is done everywhere.

        Where it raises on one process, every other raises too, instead of waiting for what will never come: of a
        LuthierError one of that kind and text, of anything else a ProcessError that names it. `work` itself speaks with
        nobody.
        """
        if self.count == 1:
            return work()
        failure: Exception | None = None
        result: Item | None = None
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 - whatever it is, the others wait
            failure = error
        failures = self.exchange(None if failure is None else _told(failure))
        if failure is not None:
            raise failure
        for rank, told in enumerate(failures):
            if told is not None:
                kind, text = told
                raise kind.__new__(kind, f"process {rank}: {text}")
        return result  # type: ignore[return-value]

    def in_turn(self, work: Callable[[], Item]) -> Item:
        """`together`, on the first process of each machine before the others, which find what it left on the disk."""
        if self.count == 1:
            return work()
        early = self.local_rank == 0
        found = self.together(work if early else lambda: None)
        late = self.together((lambda: None) if early else work)
        return found if early else late  # type: ignore[return-value]

    def first(self, work: Callable[[], Item]) -> Item:
        """What `work` gives on the first process, which alone does it; what it raises there, all raise."""
        found = self.together(work if self.is_first else lambda: None)
        return self.exchange(found)[0]  # type: ignore[return-value]


def _told(error: Exception) -> tuple[type[LuthierError], str]:
    """A failure as the other processes are told of it."""
    if isinstance(error, LuthierError):
        return type(error), str(error)
    return ProcessError, f"{type(error).__name__}: {error}"


def meet_on_cpu(timeout: int) -> None:
    """Have the processes that torchrun started on CPUs meet, where they have not yet.

    timeout: seconds that each waits for the others, then and later. On GPUs transformers does this with the time that
    it is told, but on CPUs it forgets it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=timeout))


ALONE = Processes()
