"""The flat batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from luthier.data.collate import flat_batch
from luthier.types import IGNORE_INDEX, DataError, Sample


def sample(ids: list[int], weights: list[float], index: int = 0) -> Sample:
    return Sample(np.array(ids, np.int32), np.array(weights, np.float32), "demo", index)


def test_targets_are_the_next_token_inside_a_segment() -> None:
    batch = flat_batch([sample([5, 6, 7], [1, 0, 1], 3), sample([8], [1], 4), sample([9, 10], [1, 0.5], 1)])
    assert_close(batch.input_ids, torch.tensor([[5, 6, 7, 8, 9, 10]]))
    assert_close(batch.position_ids, torch.tensor([[0, 1, 2, 0, 0, 1]]))
    assert_close(batch.cu_seqlens, torch.tensor([0, 3, 4, 6], dtype=torch.int32))
    none = IGNORE_INDEX
    assert_close(batch.targets, torch.tensor([none, 7, none, none, 10, none]))
    assert_close(batch.target_weights, torch.tensor([0, 1, 0, 0, 0.5, 0]))
    assert_close(batch.parent, torch.tensor([-1, -1, -1]))
    assert batch.max_length == 3 and batch.num_tokens == 6 and batch.num_segments == 3
    assert batch.samples == [("demo", 3), ("demo", 4), ("demo", 1)]


def test_one_batch_holds_what_the_samples_hold_alone() -> None:
    rng = np.random.default_rng(0)
    samples = [
        sample(rng.integers(0, 99, n).tolist(), rng.integers(0, 2, n).tolist())
        for n in rng.integers(1, 9, 12)
    ]
    together = flat_batch(samples)
    for name in ("targets", "target_weights"):
        apart = torch.cat([getattr(flat_batch([s]), name) for s in samples])
        assert_close(getattr(together, name), apart)


def test_read_only_arrays_are_copied() -> None:
    one = sample([1, 2], [0, 1])
    one.input_ids.flags.writeable = False
    one.weights.flags.writeable = False
    batch = flat_batch([one])
    batch.input_ids += 1
    assert one.input_ids.tolist() == [1, 2]


def test_nothing_is_no_batch() -> None:
    with pytest.raises(DataError, match="at least one sample"):
        flat_batch([])
