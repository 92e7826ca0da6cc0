"""Data as tokens: one tokenized example, what was lost on the way to it, and the flat row that goes through a model.

Shape legend: as in `types`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from luthier.conversations import Media

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor


class MediaOpener(Protocol):
    """Opens media: see `data.media_tokens.MediaReader`."""

    def __call__(self, media: Sequence[Media], input_ids: Tensor) -> dict[str, Tensor]:
        """What the model's forward takes of media in the order of their tokens in input_ids (1, T)."""

    def token_ids(self) -> frozenset[int]:
        """Ids of the tokens that stand for media."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One tokenized example: the unit that is packed, never cut again.

    input_ids (L,) int32 and weights (L,) float32: `weights[i]` is the loss weight of token i *as a target*
    (it is predicted from the tokens before it); 0 means context only.

    A sample is one sequence, or a prompt that several answers continue: then tokens [0, branches[0]) are the
    prompt, and branch k is tokens [branches[k], branches[k + 1]), each to be read right after the prompt. A pair has
    two, the better one first.
    """

    input_ids: np.ndarray[Any, np.dtype[np.int32]]
    weights: np.ndarray[Any, np.dtype[np.float32]]
    source: str = ""
    index: int = -1
    """Row index in the data set, for reports and for naming a bad row."""
    branches: tuple[int, ...] = ()
    label: float = 0.0
    """What the row says of its answers: 1 for a desirable one, else 0 (kto); the margin of a pair (rm)."""
    reference: np.ndarray[Any, np.dtype[np.float32]] | None = None
    """(N,) log-probabilities of the targets by the reference model, in their order, where they were computed before."""
    signals: Mapping[str, np.ndarray[Any, np.dtype[np.float32]]] = field(default_factory=dict)
    """What a rollout knows of each target, by name, (N,) in their order: see `experience`."""
    media: tuple[Media, ...] = ()
    """Images, films and sounds of the sequence, or of the prompt of its branches, in the order of their tokens; opened
    when the sample is collated."""
    opener: MediaOpener | None = field(default=None, compare=False, repr=False)
    """What opens them; every sample has it where the model takes media, also one without any. Not stored."""

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class Lost:
    """What did not become tokens when one row was encoded."""

    dropped: str | None = None
    """Why the whole row was left out; None where it was not."""
    tokens: int = 0
    """Tokens cut off."""
    answers: int = 0
    """Answers of which no token is left."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """What a stage makes of one row: samples, and what was lost on the way."""

    samples: tuple[Sample, ...] = ()
    lost: Lost = Lost()
    prompts: bool = False
    """Whether the samples are prompts alone, of which no target is expected."""


_TENSORS = ("input_ids", "position_ids", "cu_seqlens", "targets", "target_weights", "parent")
_OPTIONAL_TENSORS = ("rows", "labels", "reference")


@dataclass(slots=True)
class Batch:
    """One flat row of real tokens for one forward pass; see the design's "The flat batch".

    input_ids (1, T) int64, position_ids (1, T) int64, cu_seqlens (S + 1,) int32,
    targets (T,) int64: the next token, already shifted, IGNORE_INDEX where there is no loss,
    target_weights (T,) float32: the loss weight of each target,
    parent (S,) int64: the segment that this one continues, or -1.
    `samples` names where each segment came from, as (source, row index).

    rows (R,) int64 are the segments that are scored. Of n samples with B branches, row k n + i is branch k of sample
    i: of pairs, all better answers first; rows of branches that a sample does not have are left out.
    labels (n,) float32 are the samples' labels.
    reference (N,) float32: log-probabilities of the targets by the reference model, where they were computed before.
    signals: (N,) float32 each, what a rollout knows of the targets, by name (ppo, grpo).
    mismatched: the prompts of these samples with answers to other ones (kto).
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    targets: Tensor
    target_weights: Tensor
    parent: Tensor
    max_length: int
    """Length of the longest segment."""
    samples: list[tuple[str, int]] = field(default_factory=list)
    rows: Tensor | None = None
    labels: Tensor | None = None
    reference: Tensor | None = None
    signals: dict[str, Tensor] = field(default_factory=dict)
    mismatched: Batch | None = None
    media: dict[str, Tensor] = field(default_factory=dict)
    """What the model's forward takes of media, by its own names (pixel_values, image_grid_thw, ...), in the order of
    the segments; `mm_token_type_ids` (1, T) where the model wants to know which tokens stand for media."""

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[1])

    @property
    def num_segments(self) -> int:
        return int(self.cu_seqlens.shape[0]) - 1

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device` (copied only where they are elsewhere)."""
        moved: dict[str, Any] = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in (*_TENSORS, *_OPTIONAL_TENSORS)
            if getattr(self, name) is not None
        }
        moved["signals"] = {
            name: values.to(device, non_blocking=True) for name, values in self.signals.items()
        }
        moved["media"] = {name: values.to(device, non_blocking=True) for name, values in self.media.items()}
        if self.mismatched is not None:
            moved["mismatched"] = self.mismatched.to(device)
        return replace(self, **moved)
