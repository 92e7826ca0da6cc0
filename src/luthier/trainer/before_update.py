"""What policy, reference and critic say of a rollout's tokens before its first update.

The sampler has said log-probabilities already, and rounds otherwise than the passes of training do: a ratio to those
would not begin at 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from luthier.experience import Floats, OnlineStage, Rollout
from luthier.trainer.evaluation import without_dropout
from luthier.trainer.experience_passes import Piece, cut_passes, learnt_samples, part_of
from luthier.trainer.memory import running_out
from luthier.types import Policy, Sample


@dataclass(frozen=True, slots=True)
class Layout:
    """How samples go through the model: tokens of a pass, whether rows are padded, whether prompts are shared."""

    tokens_per_pass: int
    shared: bool = False
    padded: bool = False

    def cut(self, samples: Sequence[Sample], pieces: Sequence[Piece]) -> list[list[Piece]]:
        return cut_passes(samples, pieces, self.tokens_per_pass, shared=self.shared, padded=self.padded)


@dataclass(frozen=True, slots=True)
class Asking:
    """What a step lends to a rollout: the policy, its module, the arithmetic of a forward pass, the device, and the
    number of the step (from 1)."""

    policy: Policy
    model: nn.Module
    arithmetic: Callable[[], AbstractContextManager[Any]]
    device: torch.device
    step: int


def known(rollout: Rollout, stage: OnlineStage, layout: Layout, asking: Asking) -> Rollout:
    """The rollout with recomputed log-probabilities, and with the reference's and values where the stage needs them.

    Every completion goes through the model once, without gradients and without dropout.
    """
    samples = learnt_samples(rollout, np.ones(len(rollout.completions), np.bool_), {})
    found = _Found(len(rollout.sampled), stage.needs_reference, stage.needs_values)
    starts = np.cumsum([0, *(len(sample) - sample.branches[0] for sample in samples)])
    pieces = [Piece(k, 0, len(sample.branches)) for k, sample in enumerate(samples)]
    with torch.no_grad(), asking.arithmetic(), without_dropout(asking.model):
        for group in layout.cut(samples, pieces):
            tokens, parts, taken = list[np.ndarray[Any, Any]](), list[Sample](), 0
            for piece in group:
                sample = samples[piece.sample]
                ends = (*sample.branches, len(sample))
                first = int(starts[piece.sample]) - sample.branches[0]
                mine = np.arange(first + ends[piece.first], first + ends[piece.last])
                places = np.arange(taken, taken + len(mine), dtype=np.float32)
                taken += len(mine)
                tokens.append(mine)
                parts.append(replace(part_of(sample, piece), signals={"place": places}))
            _ask(stage, parts, np.concatenate(tokens), found, asking)
    return replace(rollout, logprobs=found.logprobs, reference=found.reference, values=found.values)


@dataclass(slots=True)
class _Found:
    """(N,) numbers of every token, filled in pass by pass."""

    num_tokens: int
    needs_reference: bool
    needs_values: bool
    logprobs: Floats = field(init=False)
    reference: Floats | None = field(init=False, default=None)
    values: Floats | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.logprobs = np.zeros(self.num_tokens, np.float32)
        if self.needs_reference:
            self.reference = np.zeros(self.num_tokens, np.float32)
        if self.needs_values:
            self.values = np.zeros(self.num_tokens, np.float32)


def _ask(
    stage: OnlineStage, parts: Sequence[Sample], tokens: np.ndarray[Any, Any], found: _Found, asking: Asking
) -> None:
    """Fill in what one pass says of these tokens; the stage's batch has them in an order of its own, which their
    signal tells."""
    batch = stage.collate(parts).to(asking.device)
    order = tokens[batch.signals["place"].long().cpu().numpy()]
    temperature = stage.temperature
    with running_out(batch):
        said = asking.policy.logprobs(batch, values=found.values is not None, temperature=temperature)
        found.logprobs[order] = said.logprobs.float().cpu().numpy()
        if found.values is not None:
            assert said.values is not None
            found.values[order] = said.values.float().cpu().numpy()
        if found.reference is not None:
            reference = asking.policy.reference_logprobs(batch, temperature=temperature)
            found.reference[order] = reference.float().cpu().numpy()
