"""Prepared samples and the rows behind them -> prompts that are answered and rewarded.

read_raw_rows(attrs, wanted, ...)   the rows of some data sets as their files have them
PromptTable(samples, rows, ...)     a prompt for each sample
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import overload

import numpy as np

from luthier.data.formats import to_row
from luthier.data.prompts import posed_part
from luthier.data.read import RawRow, read_rows
from luthier.data.registry import DatasetAttr
from luthier.experience import Prompt
from luthier.types import Sample

Place = tuple[str, int]
"""A data set, and the number of a row in it."""

RawRows = Mapping[Place, tuple[DatasetAttr, RawRow]]


def read_raw_rows(
    attrs: Iterable[DatasetAttr],
    wanted: Collection[Place],
    *,
    seed: int,
    max_samples: int | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
) -> RawRows:
    """Those of the `wanted` rows that these data sets have, read as `prepare` reads them; held in memory."""
    rows: dict[Place, tuple[DatasetAttr, RawRow]] = {}
    for attr in attrs:
        rng = np.random.RandomState(seed)
        for raw in read_rows(attr, max_samples=max_samples, rng=rng, cache_dir=cache_dir, token=token):
            if (attr.name, raw.index) in wanted:
                rows[attr.name, raw.index] = attr, raw
    return rows


class PromptTable(Sequence[Prompt]):
    """A prompt for each sample, whose tokens are the prompt; made when it is read."""

    def __init__(self, samples: Sequence[Sample], rows: RawRows) -> None:
        self._samples, self._rows = samples, rows

    def __len__(self) -> int:
        return len(self._samples)

    @overload
    def __getitem__(self, i: int) -> Prompt: ...
    @overload
    def __getitem__(self, i: slice) -> list[Prompt]: ...
    def __getitem__(self, i: int | slice) -> Prompt | list[Prompt]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        sample = self._samples[i]
        attr, raw = self._rows[sample.source, sample.index]
        conversation = to_row(raw, attr, "prompt").conversation
        assert conversation is not None
        before, answer = posed_part(conversation)
        return Prompt(
            sample.source,
            sample.index,
            tuple(sample.input_ids.tolist()),
            before,
            None if answer is None else answer.content,
            raw.columns,
        )
