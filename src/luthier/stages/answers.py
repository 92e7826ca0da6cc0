"""Numbers of whole answers from those of their tokens.

An answer's log-probability is that of its tokens, each counted once: what is compared has no loss weights inside.

Shapes: N supervised tokens of a batch, R its rows (`Batch.rows`), n samples. The rows of n pairs are all better
answers, then all worse ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from luthier.data.collate import branch_batch, flat_batch
from luthier.types import IGNORE_INDEX, Batch, Sample


def answers_batch(
    samples: Sequence[Sample], *, share_prompts: bool = False, branches: Sequence[int] | None = None
) -> Batch:
    """`branch_batch`, and of samples without branches a batch without rows.

    Those are the one token that a process goes through when only others have work to do.
    """
    if samples and not all(sample.branches for sample in samples):
        batch = flat_batch(samples)
        assert batch.rows is not None and batch.labels is not None
        batch.rows, batch.labels = batch.rows[:0], batch.labels[:0]
        if all(sample.reference is not None for sample in samples):
            batch.reference = torch.zeros(0)
        return batch
    return branch_batch(samples, share_prompts=share_prompts, branches=branches)


def num_rows(batch: Batch) -> int:
    """How many rows of the batch are scored."""
    assert batch.rows is not None
    return int(batch.rows.shape[0])


def token_rows(batch: Batch) -> Tensor:
    """(N,) the row that each supervised token belongs to, in the order of `Policy.logprobs`."""
    assert batch.rows is not None
    positions_N = (batch.targets != IGNORE_INDEX).nonzero()[:, 0]
    segments_N = torch.searchsorted(batch.cu_seqlens[1:].long(), positions_N, right=True)
    row_of_S = torch.full((batch.num_segments,), -1, dtype=torch.int64, device=batch.targets.device)
    row_of_S[batch.rows] = torch.arange(num_rows(batch), device=batch.targets.device)
    return row_of_S[segments_N]


def row_sums(values_N: Tensor, rows_N: Tensor, rows: int) -> Tensor:
    """(R,) float32 sums of token numbers by row; differentiable, also where there is nothing to add."""
    return torch.zeros(rows, device=values_N.device).index_add(0, rows_N, values_N.float())


def row_lengths(rows_N: Tensor, rows: int) -> Tensor:
    """(R,) int64 number of supervised tokens of each row."""
    return torch.bincount(rows_N, minlength=rows)


def pair_weights(batch: Batch, rows_N: Tensor, ld_alpha: float) -> Tensor:
    """(N,) 1 up to the length of a pair's shorter answer, `ld_alpha` beyond it.

    Length-desensitised DPO, Liu et al. (2024, arXiv:2409.06411): the shared length counts in full, what one
    answer is longer by only in part. Lengths are in supervised tokens.
    """
    counts_R = row_lengths(rows_N, num_rows(batch))
    shared_R = torch.minimum(*counts_R.chunk(2)).repeat(2)
    starts_R = counts_R.cumsum(0) - counts_R
    place_N = torch.arange(len(rows_N), device=rows_N.device) - starts_R[rows_N]
    return torch.where(place_N < shared_R[rows_N], 1.0, ld_alpha)


def row_keys(batch: Batch, rows: Tensor) -> Tensor:
    """(len(rows),) int64 that name the data row behind each of these segments, the same in every batch that it is in.

    A row that a step holds twice has the same key twice.
    """
    keys = []
    for segment in rows.tolist():
        source, index = batch.samples[segment]
        digest = hashlib.blake2b(f"{index} {source}".encode(), digest_size=8).digest()
        keys.append(int.from_bytes(digest, "little", signed=True))
    return torch.tensor(keys, dtype=torch.int64, device=rows.device)
