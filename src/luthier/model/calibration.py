"""What a method may look at before its first step: what the layers of the model are given on rows of the run.

Shapes: T real tokens of a pass, S segments, L length of the longest segment, I inputs of a layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from luthier.model.logprobs import ModelPolicy, chosen_rows
from luthier.model.rows import padded_rows
from luthier.types import Batch

_SAY_EVERY = 10.0
"""Seconds between two words to the person who waits."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """The first rows of the run, in its own order, in passes of the stage.

    scores: whether the model is a reward model. arithmetic: as of `ModelPolicy`. label: what wants to see the rows.
    """

    batches: Sequence[Batch]
    device: torch.device
    scores: bool
    arithmetic: torch.dtype | None
    label: str
    say: Callable[[str], None]

    @property
    def num_tokens(self) -> int:
        return sum(batch.num_tokens for batch in self.batches)

    def passes(self) -> Iterator[Batch]:
        """Every pass once, on the device, saying now and then how far it is."""
        said = time.monotonic()
        for number, batch in enumerate(self.batches):
            yield batch.to(self.device)
            if time.monotonic() - said > _SAY_EVERY:
                said = time.monotonic()
                self.say(f"{self.label}: {number + 1} of {len(self.batches)} passes")

    def forward(self, model: nn.Module, batch: Batch) -> None:
        """Run the model on a pass, as training does, without a graph."""
        policy = ModelPolicy(model, self.arithmetic)
        with torch.no_grad():
            if self.scores:
                policy.scores(batch)
            else:
                policy.logprobs(batch)


def real_inputs(inputs: Tensor, batch: Batch, model: nn.Module) -> Tensor:
    """(T, I) what a layer of `model` was given on `batch`, token after token, without padding.

    A layer that is given some of the tokens only (an expert, the head) keeps what it was given.
    """
    states = inputs.reshape(-1, inputs.shape[-1])
    rows = chosen_rows(model)
    if rows.padded:
        spread = padded_rows(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.targets, rows.side)
        if len(states) == spread.attention_mask.numel():
            return states[spread.attention_mask.reshape(-1).bool()]
    return states


def segment_inputs(inputs: Tensor, batch: Batch, model: nn.Module) -> list[Tensor]:
    """The same, each segment apart; all as one for a layer that is given some of the tokens only."""
    states = real_inputs(inputs, batch, model)
    if len(states) != batch.num_tokens:
        return [states] if len(states) else []
    return list(torch.split(states, batch.cu_seqlens.diff().tolist()))
