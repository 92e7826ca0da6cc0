"""Samples -> the flat batch that every stage hands the model.

flat_batch(samples)                  plain samples, one segment each
branch_batch(samples, share_prompts) samples with branches: their prompts once, or once for each branch
rows_of(sample)                      a sample's branches as plain samples
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from luthier.types import IGNORE_INDEX, Batch, DataError, RowError, Sample

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class _Segment:
    """Tokens of a sample and their loss weights as targets; `start` is the position of the first, and `parent` the
    number of the segment that they continue, or -1."""

    sample: Sample
    ids: Array
    weights: Array
    start: int = 0
    parent: int = -1


def flat_batch(samples: Sequence[Sample]) -> Batch:
    """One row of the samples' tokens, one segment each, without padding.

    `targets[i]` is token i + 1 of the same segment where its weight is positive, else IGNORE_INDEX; the last
    position of a segment never has one. Raises DataError for no samples: an empty pass is the trainer's
    dummy, not a batch.
    """
    segments = [_Segment(sample, sample.input_ids, sample.weights) for sample in samples]
    return _batch(segments, range(len(segments)), samples)


def branch_batch(
    samples: Sequence[Sample], *, share_prompts: bool, branches: Sequence[int] | None = None
) -> Batch:
    """Samples with branches: the first branches of all samples, then the second ones of those that have one.

    With `share_prompts` each prompt is a segment before them, but for its last token: that one begins every branch,
    because it predicts the first token of each. Without, every branch follows a copy of its prompt. `branches` takes
    some of them alone. A prompt of one token is not shared.
    """
    chosen = _rows(samples, branches)
    prompts: dict[int, int] = {}
    segments: list[_Segment] = []
    for number, sample in enumerate(samples):
        length = _prompt_length(sample)
        if share_prompts and length > 1:
            prompts[number] = len(segments)
            segments.append(_Segment(sample, sample.input_ids[: length - 1], sample.weights[: length - 1]))
    first = len(segments)
    for k, number in chosen:
        sample = samples[number]
        length = _prompt_length(sample)
        kept = length - 1 if number in prompts else 0
        answer = slice(*_bounds(sample)[k])
        segments.append(
            _Segment(
                sample,
                np.concatenate((sample.input_ids[kept:length], sample.input_ids[answer])),
                np.concatenate((sample.weights[kept:length], sample.weights[answer])),
                kept,
                prompts.get(number, -1),
            )
        )
    batch = _batch(segments, range(first, len(segments)), samples)
    reference = [_reference_of(samples[number], k) for k, number in chosen]
    if all(part is not None for part in reference) and reference:
        batch.reference = torch.from_numpy(np.concatenate(reference).astype(np.float32))  # type: ignore[arg-type]
    for name in samples[0].signals if samples else ():
        parts = [_part(samples[number], samples[number].signals[name], k) for k, number in chosen]
        batch.signals[name] = torch.from_numpy(np.concatenate(parts).astype(np.float32))
    return batch


def _rows(samples: Sequence[Sample], branches: Sequence[int] | None) -> list[tuple[int, int]]:
    """(branch, number of the sample) of each row in order; where `branches` names some, every sample has them."""
    if branches is not None:
        return [(k, number) for k in branches for number in range(len(samples))]
    most = max((len(sample.branches) for sample in samples), default=0)
    return [
        (k, number) for k in range(most) for number, sample in enumerate(samples) if k < len(sample.branches)
    ]


def rows_of(sample: Sample) -> list[Sample]:
    """The branches of a sample, each after its prompt, as plain samples; a plain sample as it is."""
    if not sample.branches:
        return [sample]
    prompt = slice(0, _prompt_length(sample))
    rows = []
    for k, bounds in enumerate(_bounds(sample)):
        answer = slice(*bounds)
        ids = np.concatenate((sample.input_ids[prompt], sample.input_ids[answer]))
        weights = np.concatenate((sample.weights[prompt], sample.weights[answer]))
        rows.append(
            Sample(
                ids,
                weights,
                sample.source,
                sample.index,
                (),
                sample.label,
                _reference_of(sample, k),
                media=sample.media,
                opener=sample.opener,
            )
        )
    return rows


def _prompt_length(sample: Sample) -> int:
    return sample.branches[0]


def _bounds(sample: Sample) -> list[tuple[int, int]]:
    return list(pairwise((*sample.branches, len(sample))))


def _reference_of(sample: Sample, branch: int) -> Array | None:
    """The part of `sample.reference` that belongs to one branch. Prompts have no targets of their own there."""
    return None if sample.reference is None else _part(sample, sample.reference, branch)


def _part(sample: Sample, values: Array, branch: int) -> Array:
    """Of numbers of the sample's targets, (N,) in their order, those of one branch."""
    counts = [int((sample.weights[start:stop] > 0).sum()) for start, stop in _bounds(sample)]
    start = sum(counts[:branch])
    return values[start : start + counts[branch]]


def _batch(segments: Sequence[_Segment], rows: range, samples: Sequence[Sample]) -> Batch:
    if not segments:
        raise DataError("a batch needs at least one sample")
    lengths = np.array([len(segment.ids) for segment in segments], np.int64)
    bounds = np.concatenate(([0], np.cumsum(lengths)))
    ids = np.concatenate([segment.ids for segment in segments]).astype(np.int64)
    weights = np.concatenate([segment.weights for segment in segments]).astype(np.float32)
    next_weights = np.append(weights[1:], np.float32(0))
    next_weights[bounds[1:] - 1] = 0
    targets = np.where(next_weights > 0, np.append(ids[1:], 0), IGNORE_INDEX)
    starts = np.array([segment.start for segment in segments], np.int64)
    positions = np.arange(len(ids)) - np.repeat(bounds[:-1] - starts, lengths)
    input_ids = torch.from_numpy(ids)[None]
    return Batch(
        input_ids=input_ids,
        position_ids=torch.from_numpy(positions)[None],
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        targets=torch.from_numpy(targets),
        target_weights=torch.from_numpy(next_weights),
        parent=torch.tensor([segment.parent for segment in segments], dtype=torch.int64),
        max_length=int(lengths.max()),
        samples=[(segment.sample.source, segment.sample.index) for segment in segments],
        rows=torch.arange(rows.start, rows.stop),
        labels=torch.tensor([sample.label for sample in samples], dtype=torch.float32),
        media=_opened_media(segments, input_ids),
    )


def _opened_media(segments: Sequence[_Segment], input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the model takes of the media of some segments; those of a shared prompt are in the prompt's own segment.

    Raises DataError where a file cannot be opened any more, naming data set and row.
    """
    holders = [segment.sample for segment in segments if not segment.start]
    opener = next((segment.sample.opener for segment in segments if segment.sample.opener is not None), None)
    if opener is None:
        if holder := next((sample for sample in holders if sample.media), None):
            raise DataError(
                f"data set {holder.source!r}, row {holder.index}: nothing was given that opens its media"
            )
        return {}
    try:
        return opener([one for sample in holders for one in sample.media], input_ids)
    except RowError as error:
        places = ", ".join(f"{s.source!r} row {s.index}" for s in holders if s.media)
        raise DataError(f"media of this step ({places}) changed since they were counted: {error}") from error
