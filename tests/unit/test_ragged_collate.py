"""Batches of samples whose numbers of branches differ, with what a rollout knows of their tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from luthier.data.collate import branch_batch, rows_of
from luthier.stages.answers import token_rows
from luthier.types import IGNORE_INDEX, Batch, Sample

X = IGNORE_INDEX


def sample(index: int, prompt: list[int], *answers: list[int]) -> Sample:
    """Each token's signal `number` is the token, and `half` half of it."""
    ends = np.cumsum([len(prompt), *map(len, answers)])
    ids = np.array([*prompt, *(token for answer in answers for token in answer)], np.int32)
    weights = np.repeat(np.float32([0, 1]), [len(prompt), ends[-1] - len(prompt)])
    told = ids[len(prompt) :].astype(np.float32)
    signals = {"number": told, "half": told / 2}
    return Sample(ids, weights, "made", index, tuple(ends[:-1].tolist()), signals=signals)


THREE = [sample(0, [1, 2], [3], [4, 5], [6]), sample(1, [7, 8, 9], [10]), sample(2, [11], [12, 13], [14])]
"""Three answers, one and two; the last prompt is a single token."""


def targets_of(batch: Batch) -> list[int]:
    return batch.targets[batch.targets != X].tolist()


def test_rows_of_every_branch_that_there_is() -> None:
    """First branches of all, second ones of those that have one, third ones."""
    batch = branch_batch(THREE, share_prompts=False)
    assert batch.samples == [("made", 0), ("made", 1), ("made", 2), ("made", 0), ("made", 2), ("made", 0)]
    assert batch.input_ids[0].tolist() == [1, 2, 3, 7, 8, 9, 10, 11, 12, 13, 1, 2, 4, 5, 11, 14, 1, 2, 6]
    assert batch.cu_seqlens.tolist() == [0, 3, 7, 10, 14, 16, 19]
    assert batch.targets.tolist() == [X, 3, X, X, X, 10, X, 12, 13, X, X, 4, 5, X, 14, X, X, 6, X]
    assert batch.rows is not None
    assert batch.rows.tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.parent.tolist() == [-1] * 6
    assert token_rows(batch).tolist() == [0, 1, 2, 2, 3, 3, 4, 5]


def test_shared_prompts_of_unequal_groups() -> None:
    """A prompt of one token is not shared: it begins each of its answers."""
    batch = branch_batch(THREE, share_prompts=True)
    assert batch.input_ids[0].tolist() == [1, 7, 8, 2, 3, 9, 10, 11, 12, 13, 2, 4, 5, 11, 14, 2, 6]
    assert batch.cu_seqlens.tolist() == [0, 1, 3, 5, 7, 10, 13, 15, 17]
    assert batch.position_ids[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 0, 1, 2, 1, 2, 3, 0, 1, 1, 2]
    assert batch.parent.tolist() == [-1, -1, 0, 1, -1, 0, -1, 0]
    assert batch.rows is not None
    assert batch.rows.tolist() == [2, 3, 4, 5, 6, 7]
    assert targets_of(batch) == [3, 10, 12, 13, 4, 5, 14, 6]


@pytest.mark.parametrize("shared", [False, True])
def test_signals_stand_beside_their_targets(shared: bool) -> None:
    batch = branch_batch(THREE, share_prompts=shared)
    assert set(batch.signals) == {"number", "half"}
    assert batch.signals["number"].tolist() == targets_of(batch)
    assert batch.signals["half"].tolist() == [token / 2 for token in targets_of(batch)]
    assert batch.signals["half"].dtype == torch.float32
    moved = batch.to("cpu")
    assert moved.signals["number"].tolist() == targets_of(batch)


def test_chosen_branches_take_their_signals() -> None:
    batch = branch_batch([THREE[0], THREE[2]], share_prompts=False, branches=[1])
    assert targets_of(batch) == [4, 5, 14]
    assert batch.signals["number"].tolist() == [4, 5, 14]


def test_rows_are_the_branches() -> None:
    rows = [row.input_ids.tolist() for one in THREE for row in rows_of(one)]
    assert rows == [[1, 2, 3], [1, 2, 4, 5], [1, 2, 6], [7, 8, 9, 10], [11, 12, 13], [11, 14]]
