"""Which samples share a row."""

from __future__ import annotations

import time

from hypothesis import given, strategies as st

from luthier.data.packing import balanced, best_fit, by_length, greedy_groups

lengths_and_capacity = st.tuples(st.lists(st.integers(1, 40), max_size=60), st.integers(5, 40))


def naive_best_fit(lengths: list[int], capacity: int, decreasing: bool) -> list[list[int]]:
    """Each item into the fullest group that has room, the newest of several; by definition, in O(n^2)."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i]) if decreasing else range(len(lengths))
    groups: list[list[int]] = []
    entered: list[int] = []
    for turn, i in enumerate(order):
        room = [capacity - sum(lengths[j] for j in group) for group in groups]
        fitting = [(r, -entered[g], g) for g, r in enumerate(room) if r >= lengths[i]]
        if fitting:
            g = min(fitting)[2]
            groups[g].append(i)
            entered[g] = turn
        else:
            groups.append([i])
            entered.append(turn)
    return [sorted(group) for group in groups]


@given(lengths_and_capacity, st.booleans())
def test_best_fit_is_what_its_definition_says(case: tuple[list[int], int], decreasing: bool) -> None:
    lengths, capacity = case
    assert best_fit(lengths, capacity, decreasing=decreasing) == naive_best_fit(lengths, capacity, decreasing)


@given(lengths_and_capacity, st.booleans())
def test_best_fit_uses_each_item_once_within_capacity(case: tuple[list[int], int], decreasing: bool) -> None:
    lengths, capacity = case
    groups = best_fit(lengths, capacity, decreasing=decreasing)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in group) <= capacity or len(group) == 1 for group in groups)


def test_best_fit_on_a_known_case() -> None:
    assert best_fit([4, 8, 1, 4, 2, 1], 10) == [[1, 2, 5], [0, 3, 4]]
    assert best_fit([12, 3], 10) == [[0], [1]]
    assert best_fit([], 10) == []


def test_best_fit_is_fast() -> None:
    lengths = [(i * 7919) % 900 + 20 for i in range(200_000)]
    start = time.perf_counter()
    groups = best_fit(lengths, 4096, decreasing=False)
    assert time.perf_counter() - start < 5
    assert sum(lengths) / 4096 <= len(groups) < 1.05 * sum(lengths) / 4096


@given(lengths_and_capacity)
def test_greedy_groups_take_the_longest_that_fits_and_the_last_of_equals(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    left = [i for i, length in enumerate(lengths) if length <= capacity]
    expected = []
    while left:
        group: list[int] = []
        while fitting := [i for i in left if lengths[i] + sum(lengths[j] for j in group) <= capacity]:
            group.append(max(fitting, key=lambda i: (lengths[i], i)))
            left.remove(group[-1])
        expected.append(group)
    assert greedy_groups(lengths, capacity) == expected


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 5))
def test_balanced_spreads_evenly(lengths: list[int], parts: int) -> None:
    lists = balanced(lengths, parts)
    assert sorted(i for part in lists for i in part) == list(range(len(lengths)))
    totals = [sum(lengths[i] for i in part) for part in lists]
    assert max(totals) - min(totals) <= max(lengths, default=0)


@given(lengths_and_capacity)
def test_by_length_bounds_count_times_longest(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    groups = by_length(lengths, capacity)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= capacity
        assert group == sorted(group)


def test_by_length_by_hand() -> None:
    assert by_length([3, 9, 4, 4, 1, 2], 8) == [[1], [2, 3], [0, 5], [4]]
    assert by_length([], 8) == []
