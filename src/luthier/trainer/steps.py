"""The data loader's items: one optimizer step each, as the flat batches that this process runs for it.

A step is a list of passes. How a step's rows are cut into passes changes memory, never the loss, because
every pass contributes sums. Order and cut come from a plan that is a pure function of the epoch, so a resumed
run needs no state of the loader, only its step number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from luthier.types import Batch, Sample

Passes = Sequence[Sequence[int]]
"""Sample indices of each pass of one process in one step."""
Plan = Sequence[Sequence[Passes]]
"""An epoch: steps -> processes -> passes."""


class StepDataset(Dataset[list[Batch]]):
    """Item i is the list of flat batches of step i of the current epoch, for process `rank`."""

    def __init__(
        self,
        samples: Sequence[Sample],
        plan_epoch: Callable[[int], Plan],
        collate: Callable[[Sequence[Sample]], Batch],
        rank: int,
    ) -> None:
        self.num_samples = len(samples)
        self._samples = samples
        self._plan_epoch = plan_epoch
        self._collate = collate
        self._rank = rank
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self._plan = self._plan_epoch(epoch)

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, step: int) -> list[Batch]:
        passes = self._plan[step][self._rank]
        return [
            self._collate([self._samples[index] for index in indices] or [self._dummy()])
            for indices in passes
        ]

    def _dummy(self) -> Sample:
        """One token that teaches nothing, for a process that has nothing to do while others work."""
        first = self._samples[0]
        return Sample(first.input_ids[:1], first.weights[:1] * 0)


class EpochCallback(TrainerCallback):
    """Tells the dataset which epoch begins, before the loader is read."""

    def __init__(self, dataset: StepDataset) -> None:
        self._dataset = dataset

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._dataset.set_epoch(state.global_step // len(self._dataset))
