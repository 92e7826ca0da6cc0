"""Answers to other prompts."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.data.partners import Mismatched
from luthier.data.table import SampleTable
from luthier.types import Sample


def answer(index: int, prompt: list[int], ids: list[int], weight: float = 1.0, label: float = 1.0) -> Sample:
    return Sample(
        np.array([*prompt, *ids], np.int32),
        np.array([0.0] * len(prompt) + [weight] * len(ids), np.float32),
        "demo",
        index,
        (len(prompt),),
        label,
    )


THREE = [
    answer(0, [1, 2], [3, 4, 5], 0.5),
    answer(1, [6], [7], label=0.0),
    answer(2, [8, 9, 10], [11, 12]),
]


def tokens(samples: Mismatched) -> list[tuple[list[int], tuple[int, ...]]]:
    return [(sample.input_ids.tolist(), sample.branches) for sample in samples]


def test_each_takes_the_answer_of_the_sample_before() -> None:
    mismatched = Mismatched(THREE)
    assert tokens(mismatched) == [
        ([1, 2, 3, 4, 5, 11, 12], (2, 5)),
        ([6, 7, 3, 4, 5], (1, 2)),
        ([8, 9, 10, 11, 12, 7], (3, 5)),
    ]
    assert [sample.weights.tolist() for sample in mismatched] == [
        [0, 0, 0.5, 0.5, 0.5, 1, 1],
        [0, 1, 0.5, 0.5, 0.5],
        [0, 0, 0, 1, 1, 1],
    ]
    assert [(sample.source, sample.index, sample.label) for sample in mismatched] == [
        ("demo", 0, 1.0),
        ("demo", 1, 0.0),
        ("demo", 2, 1.0),
    ]
    assert mismatched[0].input_ids.dtype == np.int32 and mismatched[0].weights.dtype == np.float32
    assert len(mismatched) == 3


def test_it_is_a_sequence() -> None:
    mismatched = Mismatched(THREE)
    assert mismatched[-1].input_ids.tolist() == mismatched[2].input_ids.tolist()
    assert [sample.index for sample in mismatched[1:]] == [1, 2]
    assert [sample.input_ids.tolist() for sample in mismatched[::-1]] == [
        ids for ids, _ in reversed(tokens(mismatched))
    ]
    with pytest.raises(IndexError):
        mismatched[3]


def test_a_single_sample_keeps_its_own_answer() -> None:
    assert tokens(Mismatched(THREE[:1])) == [([1, 2, 3, 4, 5, 3, 4, 5], (2, 5))]
    table = SampleTable.of([(0, THREE[0])])
    assert tokens(Mismatched.of(table, 100)) == [([1, 2, 3, 4, 5, 3, 4, 5], (2, 5))]
    assert len(Mismatched.of(SampleTable(), 100)) == 0


def test_a_borrowed_answer_that_is_too_long_is_cut_at_its_end() -> None:
    mismatched = Mismatched(THREE, 4)
    # each fits just so
    assert tokens(mismatched) == [
        ([1, 2, 3, 4, 5, 11, 12], (2, 5)),
        ([6, 7, 3, 4, 5], (1, 2)),
        ([8, 9, 10, 11, 12, 7], (3, 5)),
    ]
    assert tokens(Mismatched(THREE, 3))[:2] == [([1, 2, 3, 4, 5, 11], (2, 5)), ([6, 7, 3, 4], (1, 2))]
    assert tokens(Mismatched(THREE, 3))[2] == ([8, 9, 10, 11, 12], (3, 5))


def test_pairs_borrow_from_the_row_before() -> None:
    """The sample before the second answer of a pair answers the same prompt."""
    pairs = [
        answer(0, [1], [10]),
        answer(0, [1], [11], label=0.0),
        answer(1, [2], [20]),
        answer(1, [2], [21], label=0.0),
        answer(2, [3], [30]),
        answer(2, [3], [31], label=0.0),
    ]
    table = SampleTable.of((sample.index, sample) for sample in pairs)
    assert [ids for ids, _ in tokens(Mismatched.of(table, 100))] == [
        [1, 10, 30],
        [1, 11, 31],
        [2, 20, 10],
        [2, 21, 11],
        [3, 30, 20],
        [3, 31, 21],
    ]
    # the table's own rows count, not the numbers in the file: both halves of a file that was read twice
    assert [ids for ids, _ in tokens(Mismatched.of(SampleTable.of(enumerate(pairs)), 100))][:2] == [
        [1, 10, 31],
        [1, 11, 10],
    ]


def test_the_order_of_the_table_decides() -> None:
    table = SampleTable.of((sample.index, sample) for sample in THREE).take_rows(np.array([2, 0]))
    assert tokens(Mismatched.of(table, 100)) == [
        ([8, 9, 10, 11, 12, 3, 4, 5], (3, 5)),
        ([1, 2, 3, 4, 5, 11, 12], (2, 5)),
    ]
