"""Answers to other prompts: what KTO measures the divergence from its reference by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import overload

import numpy as np

from luthier.data.table import SampleTable
from luthier.types import Sample


class Mismatched(Sequence[Sample]):
    """Samples of one answer each; every one is given a second branch, the answer of the sample before it.

    KTO's estimate wants answers y' that have nothing to do with the prompt x (Ethayarajh et al., 2024,
    arXiv:2402.01306, section 4.1). The first sample takes the last one's answer; a single sample keeps its own, so that
    its divergence is that of its own answer. Which answer goes with which prompt depends on the data alone, not on
    batches, so it can be computed in advance.

    `together` is how many samples one row gives, next to each other: with 2 (pairs) an answer comes from two samples
    before, as the one before answers the same prompt. A borrowed answer that does not fit into `max_length` behind its
    new prompt is cut at its end.
    """

    def __init__(
        self, samples: Sequence[Sample], max_length: int | None = None, *, together: int = 1
    ) -> None:
        self._samples, self._max_length, self._together = samples, max_length, together

    @classmethod
    def of(cls, table: SampleTable, max_length: int) -> Mismatched:
        """The samples of a whole table."""
        together = int(np.bincount(table.rows).max()) if len(table) else 1
        return cls(table, max_length, together=together)

    def __len__(self) -> int:
        return len(self._samples)

    @overload
    def __getitem__(self, i: int) -> Sample: ...
    @overload
    def __getitem__(self, i: slice) -> list[Sample]: ...
    def __getitem__(self, i: int | slice) -> Sample | list[Sample]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        own, other = self._samples[i], self._samples[(i - self._together) % len(self)]
        start, room = other.branches[0], len(other)
        if self._max_length is not None:
            room = max(self._max_length - own.branches[0], 0)
        answer = slice(start, start + room)
        return replace(
            own,
            input_ids=np.concatenate((own.input_ids, other.input_ids[answer])),
            weights=np.concatenate((own.weights, other.weights[answer])),
            branches=(*own.branches, len(own)),
        )
