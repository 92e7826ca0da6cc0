"""Samples -> the flat batch that every stage hands the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from luthier.types import IGNORE_INDEX, Batch, DataError, Sample


def flat_batch(samples: Sequence[Sample]) -> Batch:
    """One row of the samples' tokens, one segment each, without padding.

    `targets[i]` is token i + 1 of the same segment where its weight is positive, else IGNORE_INDEX; the last
    position of a segment never has one. Raises DataError for no samples: an empty pass is the trainer's
    dummy, not a batch.
    """
    if not samples:
        raise DataError("a batch needs at least one sample")
    lengths = np.array([len(sample) for sample in samples], np.int64)
    bounds = np.concatenate(([0], np.cumsum(lengths)))
    ids = np.concatenate([sample.input_ids for sample in samples]).astype(np.int64)
    weights = np.concatenate([sample.weights for sample in samples]).astype(np.float32)
    next_weights = np.append(weights[1:], np.float32(0))
    next_weights[bounds[1:] - 1] = 0
    targets = np.where(next_weights > 0, np.append(ids[1:], 0), IGNORE_INDEX)
    positions = np.arange(len(ids)) - np.repeat(bounds[:-1], lengths)
    return Batch(
        input_ids=torch.from_numpy(ids)[None],
        position_ids=torch.from_numpy(positions)[None],
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        targets=torch.from_numpy(targets),
        target_weights=torch.from_numpy(next_weights),
        parent=torch.full((len(samples),), -1, dtype=torch.int64),
        max_length=int(lengths.max()),
        samples=[(sample.source, sample.index) for sample in samples],
    )
