"""Batches of samples with branches, with tensors written by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from luthier.data.collate import branch_batch, flat_batch, rows_of
from luthier.data.partners import Mismatched
from luthier.types import IGNORE_INDEX, Batch, DataError, Sample

X = IGNORE_INDEX
REFERENCE = np.arange(10, dtype=np.float32) / 10


def sample(
    index: int,
    prompt: list[int],
    answers: Sequence[list[int]],
    label: float = 0.0,
    *,
    weight: float = 1.0,
    reference: bool = False,
) -> Sample:
    bounds = np.cumsum([len(prompt), *map(len, answers)]).tolist()
    ids = [*prompt, *(token for answer in answers for token in answer)]
    count = len(ids) - len(prompt)
    return Sample(
        np.array(ids, np.int32),
        np.array([0.0] * len(prompt) + [weight] * count, np.float32),
        "demo",
        index,
        tuple(bounds[:-1]),
        label,
        REFERENCE[:count] + index if reference else None,
    )


PAIRS = [
    sample(3, [1, 2, 3], [[4, 5], [6]], 0.5, reference=True),
    sample(7, [11, 12], [[13], [14, 15, 16]], weight=0.25, reference=True),
]


def whole(batch: Batch, **expected: object) -> None:
    """Every field of a batch, against these lists."""
    for name, values in expected.items():
        found = getattr(batch, name)
        if isinstance(found, torch.Tensor):
            assert_close(found, torch.tensor(values, dtype=found.dtype), rtol=0, atol=0, msg=name)
        else:
            assert found == values, name


def test_every_branch_after_a_copy_of_its_prompt() -> None:
    batch = branch_batch(PAIRS, share_prompts=False)
    whole(
        batch,
        input_ids=[[1, 2, 3, 4, 5, 11, 12, 13, 1, 2, 3, 6, 11, 12, 14, 15, 16]],
        position_ids=[[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 4]],
        cu_seqlens=[0, 5, 8, 12, 17],
        targets=[X, X, 4, 5, X, X, 13, X, X, X, 6, X, X, 14, 15, 16, X],
        target_weights=[0, 0, 1, 1, 0, 0, 0.25, 0, 0, 0, 1, 0, 0, 0.25, 0.25, 0.25, 0],
        parent=[-1, -1, -1, -1],
        rows=[0, 1, 2, 3],
        labels=[0.5, 0.0],
        reference=[3.0, 3.1, 7.0, 3.2, 7.1, 7.2, 7.3],
        max_length=5,
        samples=[("demo", 3), ("demo", 7), ("demo", 3), ("demo", 7)],
        mismatched=None,
    )
    assert (batch.input_ids.dtype, batch.cu_seqlens.dtype, batch.labels.dtype) == (  # type: ignore[union-attr]
        torch.int64,
        torch.int32,
        torch.float32,
    )


def test_prompts_once_but_for_their_last_token() -> None:
    batch = branch_batch(PAIRS, share_prompts=True)
    whole(
        batch,
        input_ids=[[1, 2, 11, 3, 4, 5, 12, 13, 3, 6, 12, 14, 15, 16]],
        position_ids=[[0, 1, 0, 2, 3, 4, 1, 2, 2, 3, 1, 2, 3, 4]],
        cu_seqlens=[0, 2, 3, 6, 8, 10, 14],
        targets=[X, X, X, 4, 5, X, 13, X, 6, X, 14, 15, 16, X],
        target_weights=[0, 0, 0, 1, 1, 0, 0.25, 0, 1, 0, 0.25, 0.25, 0.25, 0],
        parent=[-1, -1, 0, 1, 0, 1],
        rows=[2, 3, 4, 5],
        labels=[0.5, 0.0],
        reference=[3.0, 3.1, 7.0, 3.2, 7.1, 7.2, 7.3],
        max_length=4,
        samples=[("demo", 3), ("demo", 7)] * 3,
    )


def test_a_prompt_of_one_token_is_not_shared() -> None:
    one = sample(0, [1], [[2], [3]])
    batch = branch_batch([one, PAIRS[1]], share_prompts=True)
    whole(
        batch,
        input_ids=[[11, 1, 2, 12, 13, 1, 3, 12, 14, 15, 16]],
        position_ids=[[0, 0, 1, 1, 2, 0, 1, 1, 2, 3, 4]],
        cu_seqlens=[0, 1, 3, 5, 7, 11],
        targets=[X, 2, X, 13, X, 3, X, 14, 15, 16, X],
        parent=[-1, -1, 0, -1, 0],
        rows=[1, 2, 3, 4],
        labels=[0.0, 0.0],
        reference=None,
    )
    whole(branch_batch([one], share_prompts=True), parent=[-1, -1], rows=[0, 1], cu_seqlens=[0, 2, 4])


@pytest.mark.parametrize("shared", [False, True])
def test_some_branches_alone(shared: bool) -> None:
    first = branch_batch(PAIRS, share_prompts=shared, branches=[0])
    second = branch_batch(PAIRS, share_prompts=shared, branches=[1])
    answers = [batch.targets[batch.targets != X].tolist() for batch in (first, second)]
    assert answers == [[4, 5, 13], [6, 14, 15, 16]]
    whole(first, reference=[3.0, 3.1, 7.0], labels=[0.5, 0.0])
    whole(second, reference=[3.2, 7.1, 7.2, 7.3], labels=[0.5, 0.0])
    both = branch_batch(PAIRS, share_prompts=shared, branches=[1, 0])
    assert both.targets[both.targets != X].tolist() == [6, 14, 15, 16, 4, 5, 13]
    if not shared:
        whole(second, input_ids=[[1, 2, 3, 6, 11, 12, 14, 15, 16]], rows=[0, 1], cu_seqlens=[0, 4, 9])
    else:
        whole(second, input_ids=[[1, 2, 11, 3, 6, 12, 14, 15, 16]], rows=[2, 3], parent=[-1, -1, 0, 1])


def test_mismatched_answers_are_second_branches() -> None:
    answers = [sample(0, [1, 2], [[3, 4]], 1.0), sample(1, [5], [[6]], 0.0)]
    mismatched = Mismatched(answers)[:]
    whole(
        branch_batch(mismatched, share_prompts=False, branches=[0]),
        input_ids=[[1, 2, 3, 4, 5, 6]],
        targets=[X, 3, 4, X, 6, X],
        rows=[0, 1],
        labels=[1.0, 0.0],
    )
    whole(
        branch_batch(mismatched, share_prompts=False, branches=[1]),
        input_ids=[[1, 2, 6, 5, 3, 4]],
        targets=[X, 6, X, 3, 4, X],
        cu_seqlens=[0, 3, 6],
        rows=[0, 1],
        labels=[1.0, 0.0],
    )


def test_without_all_references_there_is_none() -> None:
    batch = branch_batch([PAIRS[0], sample(1, [1], [[2], [3]])], share_prompts=False)
    assert batch.reference is None


def test_rows_are_the_branches_after_their_prompts() -> None:
    first, second = rows_of(PAIRS[1])
    assert [first.input_ids.tolist(), second.input_ids.tolist()] == [[11, 12, 13], [11, 12, 14, 15, 16]]
    assert [first.weights.tolist(), second.weights.tolist()] == [[0, 0, 0.25], [0, 0, 0.25, 0.25, 0.25]]
    for row, reference in ((first, [7.0]), (second, [7.1, 7.2, 7.3])):
        assert (row.source, row.index, row.branches, row.label) == ("demo", 7, (), 0.0)
        assert row.reference is not None
        np.testing.assert_array_equal(row.reference, np.array(reference, np.float32))
    plain = Sample(np.array([1, 2], np.int32), np.ones(2, np.float32))
    assert rows_of(plain) == [plain]


def test_rows_make_the_batch_that_branches_make_without_sharing() -> None:
    rng = np.random.default_rng(0)
    samples = [sample(i, *_random_parts(rng), reference=True) for i in range(6)]
    rows = [rows_of(one) for one in samples]
    expected = flat_batch([row[k] for k in (0, 1) for row in rows])
    found = branch_batch(samples, share_prompts=False)
    for name in ("input_ids", "position_ids", "cu_seqlens", "targets", "target_weights", "parent", "rows"):
        assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0)
    shared = branch_batch(samples, share_prompts=True)
    assert_close(shared.targets[shared.targets != X], found.targets[found.targets != X])
    assert_close(shared.reference, found.reference)
    # of two copies of n tokens, the shared prompt's n - 1 and a last one for each branch remain
    assert found.num_tokens - shared.num_tokens == sum(one.branches[0] - 1 for one in samples)


def _random_parts(rng: np.random.Generator) -> tuple[list[int], list[list[int]]]:
    prompt, *answers = (rng.integers(0, 99, n).tolist() for n in rng.integers(1, 5, 3))
    return prompt, answers


def test_nothing_is_no_batch() -> None:
    with pytest.raises(DataError, match="at least one sample"):
        branch_batch([], share_prompts=True)
