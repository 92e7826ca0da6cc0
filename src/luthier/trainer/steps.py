"""The data loader's items: one optimizer step each, as the flat batches that this process runs for it.

A step is a list of passes. How a step's rows are cut into passes changes memory, never the loss, because
every pass contributes sums. Order and cut come from a plan that is a pure function of the epoch, so a resumed
run needs no state of the loader, only its step number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from luthier.data.batching import EpochPlan
from luthier.types import Batch, Sample

Passes = Sequence[Sequence[int]]
"""Sample indices of each pass of one process in one step."""


NOBODY = "(nobody)"
"""The data set that an idle process's token is of."""


class StepDataset(Dataset[list[Batch]]):
    """Item i is the list of flat batches of step i of the current epoch, for process `rank`."""

    def __init__(
        self,
        samples: Sequence[Sample],
        plan_epoch: Callable[[int], EpochPlan],
        collate: Callable[[Sequence[Sample]], Batch],
        rank: int,
        sources: Sequence[str] = (),
    ) -> None:
        """`sources` names the training sets that the samples come from."""
        self.sources = tuple(sources)
        self.num_samples = len(samples)
        self._samples = samples
        self._plan_epoch = plan_epoch
        self._collate = collate
        self._rank = rank
        self._limit: int | None = None
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self._plan = self._plan_epoch(epoch)
        if self._limit is not None:
            self.limit_passes(self._limit)

    @property
    def plan(self) -> EpochPlan:
        """The steps of the current epoch."""
        return self._plan

    @property
    def tokens_per_pass(self) -> int | None:
        """Most tokens of a pass; None where passes are the rows of a micro-batch."""
        return self._plan.tokens_per_pass

    def limit_passes(self, tokens: int) -> None:
        """Cut the steps of this epoch and all later ones into passes of at most `tokens` tokens."""
        self._limit = tokens
        self._plan = replace(self._plan, tokens_per_pass=tokens)

    def again(self, step: int) -> list[Batch]:
        """Step `step` of the whole run (from 0), which is one of the present epoch."""
        return self[step % len(self)]

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch ends before step `step` that the loop does not know of."""
        return False

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, step: int) -> list[Batch]:
        passes = self._plan[step][self._rank]
        return [
            self._collate([self._samples[index] for index in indices] or [idle(self._samples)])
            for indices in passes
        ]


def idle(samples: Sequence[Sample]) -> Sample:
    """One token that teaches nothing, for a process that has nothing to do while others work."""
    first = samples[0]
    known = None if first.reference is None else first.reference[:0]
    return Sample(first.input_ids[:1], first.weights[:1] * 0, NOBODY, reference=known, opener=first.opener)


def learnt_tokens(batch: Batch) -> int:
    """Real tokens of a pass, 0 of one that is `idle`."""
    return 0 if all(source == NOBODY for source, _ in batch.samples) else batch.num_tokens


class Epochs(Protocol):
    """The optimizer steps of an epoch, as items of a data set."""

    num_samples: int

    def set_epoch(self, epoch: int) -> None: ...

    def __len__(self) -> int: ...


class EpochCallback(TrainerCallback):
    """Tells the dataset which epoch begins, before the loader is read."""

    def __init__(self, dataset: Epochs) -> None:
        self._dataset = dataset

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._dataset.set_epoch(state.global_step // len(self._dataset))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if isinstance(self._dataset, StepDataset) and self._dataset.ends_epoch(state.global_step):
            control.should_save |= args.save_strategy == SaveStrategy.EPOCH
            control.should_evaluate |= args.eval_strategy == IntervalStrategy.EPOCH
