"""The loss of each training set, from the very numbers that are summed to the loss of all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from luthier.types import IGNORE_INDEX, Batch, LossSum, Term


def source_terms(batch: Batch, loss_sum: LossSum, sources: Sequence[str]) -> dict[str, Term]:
    """`loss/<data set>` of one pass: what its targets or samples add to the loss, and their weight.

    Every source has a term in every pass, of weight 0 where it has no row there, so that all processes have the same.
    Empty where there are fewer than two sources, or where the stage does not say what a row adds. A name that the
    stage's own metrics have already is given as `loss/<data set> (data)`.
    """
    parts = loss_sum.by_target or loss_sum.by_sample
    if len(sources) < 2 or parts is None:
        return {}
    numbers = {source: number for number, source in enumerate(sources)}
    device, others = batch.targets.device, len(sources)
    number_S = torch.tensor([numbers.get(source, others) for source, _ in batch.samples], device=device)
    number_K = number_S[_segments(batch, loss_sum)]
    totals, weights = (
        torch.zeros(others + 1, dtype=torch.float64, device=device).index_add(
            0, number_K, values.detach().double()
        )
        for values in (parts.total, parts.weight)
    )
    names = [f"loss/{source}" for source in sources]
    names = [f"{name} (data)" if name in loss_sum.metrics else name for name in names]
    return {name: Term(totals[number], weights[number]) for number, name in enumerate(names)}


def _segments(batch: Batch, loss_sum: LossSum) -> Tensor:
    """(K,) int64 the segment of each target, or a segment of each sample."""
    if loss_sum.by_target is not None:
        positions_N = (batch.targets != IGNORE_INDEX).nonzero()[:, 0]
        return torch.searchsorted(batch.cu_seqlens[1:].long(), positions_N, right=True)
    assert loss_sum.by_sample is not None and batch.rows is not None
    return batch.rows[: len(loss_sum.by_sample.total)]
