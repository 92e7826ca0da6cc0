"""Mixtures of data sets: shares in closed form, order equal to the library's, epochs of equal length."""

from __future__ import annotations

from fractions import Fraction
from itertools import islice
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from pydantic import ValidationError

from luthier.data.batching import EpochPlan, RowsRule, TokensRule, plan_epoch
from luthier.data.mixing import epoch_visits, mixed_rows, shares, turns
from luthier.recipe.mixture import MixSpec
from luthier.types import DataError

ENDS = {"first": "first_exhausted", "all": "all_exhausted", "once": "all_exhausted_without_replacement"}
sizes_of = st.lists(st.integers(1, 40), min_size=2, max_size=4)


def names_of(sizes: list[int]) -> list[str]:
    return [f"set{i}" for i in range(len(sizes))]


def members_of(sizes: list[int]) -> dict[str, Any]:
    starts = np.cumsum([0, *sizes])
    return {
        name: np.arange(start, start + size)
        for name, start, size in zip(names_of(sizes), starts, sizes, strict=False)
    }


def listed(spec: MixSpec, sizes: list[int], seed: int = 0) -> list[int]:
    return list(turns(spec, names_of(sizes), sizes, seed=seed, epoch=0))


# --------------------------------------------------------------------------------------------------
# The library's order


@settings(deadline=None, max_examples=25)
@given(sizes_of, st.integers(0, 1000), st.sampled_from(sorted(ENDS)), st.booleans())
def test_rows_are_those_of_interleave_datasets(sizes: list[int], seed: int, until: Any, drawn: bool) -> None:
    weights = np.random.default_rng(seed).dirichlet(np.full(len(sizes), 3.0)).tolist()
    probabilities = tuple(weights) if drawn else None
    starts = np.cumsum([0, *sizes])
    sets = [
        datasets.Dataset.from_dict({"row": list(range(start, start + size))})
        for start, size in zip(starts, sizes, strict=False)
    ]
    wanted = datasets.interleave_datasets(
        sets, probabilities=weights if drawn else None, seed=seed, stopping_strategy=ENDS[until]
    )
    spec = MixSpec(strategy="interleave", until=until, probabilities=probabilities)
    assert mixed_rows(spec, names_of(sizes), sizes, seed=seed).tolist() == wanted["row"][:]


def test_the_example_of_the_library_by_hand() -> None:
    spec = MixSpec(strategy="interleave", until="once")
    assert mixed_rows(spec, names_of([3, 4, 3]), [3, 4, 3], seed=0).tolist() == [0, 3, 7, 1, 4, 8, 2, 5, 9, 6]


# --------------------------------------------------------------------------------------------------
# Shares


@pytest.mark.parametrize(
    ("fields", "sizes", "wanted"),
    [
        ({}, [10, 30], [10, 30]),
        ({"weights": {"set0": 3, "set1": 1}}, [10, 30], [30, 10]),
        ({"weights": {"set0": 3, "set1": 1}, "until": "first"}, [10, 30], [10, 3]),
        ({"weights": {"set0": 3, "set1": 1}, "until": "all"}, [10, 30], [90, 30]),
        ({"weights": {"set0": 3, "set1": 1}, "until": "once"}, [10, 30], [10, 30]),
        ({"strategy": "interleave", "until": "first"}, [10, 30], [10, 10]),
        ({"strategy": "interleave", "until": "all"}, [10, 30], [30, 30]),
        ({"counts": {"set1": 7}}, [10, 30], [10, 7]),
        ({"counts": {"set0": 25}}, [10, 30], [25, 30]),
        ({"temperature": 1}, [10, 30], [10, 30]),
        # 100^(1/2) : 400^(1/2) : 900^(1/2) = 1 : 2 : 3 of 1400
        ({"temperature": 2}, [100, 400, 900], [233, 467, 700]),
        ({"temperature": 1e9}, [10, 30], [20, 20]),
    ],
)
def test_shares_in_closed_form(fields: dict[str, Any], sizes: list[int], wanted: list[int]) -> None:
    spec = MixSpec(**fields)
    assert shares(spec, names_of(sizes), sizes) == wanted
    assert np.bincount(listed(spec, sizes)).tolist() == wanted


@settings(deadline=None)
@given(
    sizes_of, st.lists(st.integers(1, 20), min_size=4, max_size=4), st.sampled_from(["first", "all", "total"])
)
def test_every_count_is_its_share_rounded(sizes: list[int], weights: list[int], until: Any) -> None:
    names = names_of(sizes)
    spec = MixSpec(weights=dict(zip(names, weights, strict=False)), until=until)
    counts, whole = shares(spec, names, sizes), sum(weights[: len(sizes)])
    for count, weight, size in zip(counts, weights, sizes, strict=False):
        assert abs(Fraction(weight, whole) * sum(counts) - count) < 1 + Fraction(len(sizes), whole)
        assert count <= size or until != "first"
        assert count >= size or until != "all"
    if until == "total":
        assert sum(counts) == sum(sizes)
    if until == "first":  # the set that ends the epoch has nothing left that would fit another round
        assert any(count + 1 > size - 1 for count, size in zip(counts, sizes, strict=True))


@settings(deadline=None)
@given(sizes_of, st.dictionaries(st.sampled_from(["set0", "set1"]), st.integers(1, 60), min_size=1))
def test_turns_space_samples_evenly(sizes: list[int], counts: dict[str, int]) -> None:
    spec = MixSpec(strategy="interleave", counts=counts)
    wanted = list((dict(zip(names_of(sizes), sizes, strict=True)) | counts).values())
    times = sorted((Fraction(2 * k + 1, 2 * n), i) for i, n in enumerate(wanted) for k in range(n))
    assert listed(spec, sizes) == [i for _, i in times]


# --------------------------------------------------------------------------------------------------
# Streams


def test_a_stream_says_when_a_set_is_empty() -> None:
    def until(end: Any) -> list[int]:
        order = turns(MixSpec(strategy="interleave", until=end), ["a", "b", "c"], None, seed=0, epoch=0)
        given, left = [next(order)], [2, 1, 4]
        for _ in range(30):
            left[given[-1]] -= 1
            try:
                given.append(order.send(given[-1]) if left[given[-1]] == 0 else next(order))
            except StopIteration:
                return given
        raise AssertionError("the order does not end")

    sizes = [2, 1, 4]
    assert until("first") == [0, 1]  # in the middle of a round, which nobody knew to be the last
    for end in ("all", "once"):
        assert until(end) == listed(MixSpec(strategy="interleave", until=end), sizes)


def test_streams_one_after_the_other_and_without_an_end() -> None:
    order = turns(MixSpec(), ["a", "b"], None, seed=0, epoch=0)
    assert [next(order), next(order), order.send(0), next(order)] == [0, 0, 1, 1]
    with pytest.raises(StopIteration):
        order.send(1)
    weighted = turns(
        MixSpec(weights={"a": 3, "b": 1}, strategy="interleave"), ["a", "b"], None, seed=0, epoch=0
    )
    assert list(islice(weighted, 8)) == [0, 0, 1, 0, 0, 0, 1, 0]
    fixed = turns(MixSpec(counts={"a": 2, "b": 1}), ["a", "b"], None, seed=0, epoch=0)
    assert list(fixed) == [0, 0, 1]


# --------------------------------------------------------------------------------------------------
# The samples of an epoch


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_larger_set_goes_on_where_the_last_epoch_ended(shuffle: bool) -> None:
    spec, members = MixSpec(counts={"set0": 4, "set1": 5}), members_of([12, 2])
    epochs = [epoch_visits(spec, members, seed=7, epoch=e, shuffle=shuffle) for e in range(4)]
    assert sorted(np.concatenate([visits[:4] for visits in epochs[:3]])) == list(range(12))
    both = np.concatenate([visits[4:] for visits in epochs])
    assert (np.bincount(both)[12:] == 10).all()  # 4 x 5 of two samples, each as often
    if not shuffle:
        assert epochs[1].tolist() == [4, 5, 6, 7, 13, 12, 13, 12, 13]
        assert epochs[3].tolist() == [0, 1, 2, 3, 13, 12, 13, 12, 13]


@settings(deadline=None, max_examples=60)
@given(
    sizes_of,
    st.lists(st.integers(1, 9), min_size=4, max_size=4),
    st.sampled_from(["first", "all", "total"]),
    st.sampled_from([RowsRule(2, 2), TokensRule(40)]),
    st.booleans(),
    st.sampled_from([None, 50]),
    st.integers(1, 3),
)
def test_epochs_have_equal_steps_and_every_visit_once(
    sizes: list[int],
    weights: list[int],
    until: Any,
    rule: RowsRule | TokensRule,
    shuffle: bool,
    row_tokens: int | None,
    world_size: int,
) -> None:
    spec = MixSpec(weights=dict(zip(names_of(sizes), weights, strict=False)), until=until)
    lengths = np.random.default_rng(sum(sizes)).integers(1, 40, sum(sizes))

    def visits(epoch: int) -> Any:
        return epoch_visits(spec, members_of(sizes), seed=3, epoch=epoch, shuffle=shuffle)

    def plan(epoch: int, count: int) -> EpochPlan:
        return plan_epoch(
            lengths,
            rule=rule,
            epoch=epoch,
            seed=3,
            shuffle=shuffle,
            world_size=count,
            visits=visits,
            row_tokens=row_tokens,
        )

    plans = [plan(epoch, world_size) for epoch in range(4)]
    assert len({len(made) for made in plans}) == 1
    for epoch, made in enumerate(plans):
        seen = [i for step in made for rank in step for batch in rank for i in batch]
        assert sorted(seen) == sorted(visits(epoch).tolist())
        assert all(any(batch for rank in step for batch in rank) for step in made)
        assert made.units == plan(epoch, world_size).units  # as another process computes it
        if not shuffle:
            in_turn = [i for step in made.units for batch in step for i in batch]
            assert in_turn == visits(epoch).tolist()
    if isinstance(rule, TokensRule):  # a step never depends on the number of processes
        assert plan(1, 1).units == plans[1].units


def test_steps_grow_by_little_where_an_epoch_needs_more_of_them() -> None:
    """Epoch 0 has short samples alone, epoch 1 long ones: twice the tokens in as many steps."""
    lengths = np.repeat([10, 20], 40)
    spec, members = MixSpec(counts={"a": 40}), {"a": np.arange(80)}

    def visits(epoch: int) -> Any:
        return epoch_visits(spec, members, seed=0, epoch=epoch, shuffle=False)

    plans = [
        plan_epoch(lengths, rule=TokensRule(40), epoch=epoch, seed=0, shuffle=False, visits=visits)
        for epoch in range(2)
    ]
    assert [len(made) for made in plans] == [10, 10]
    assert {plans[0].tokens(step) for step in range(10)} == {40}
    assert {plans[1].tokens(step) for step in range(10)} == {80}


# --------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": {"a": 0}}, "greater than 0"),
        ({"counts": {"a": -1}}, "greater than 0"),
        ({"temperature": 0}, "greater than 0"),
        ({"strategy": "interleave", "probabilities": (0.5, 0.4)}, "sum to 0.9"),
        ({"strategy": "interleave", "probabilities": (1.5, -0.5)}, "from 0 to 1"),
        ({"probabilities": (0.5, 0.5)}, "strategy: interleave"),
        ({"weights": {"a": 1}, "temperature": 2}, "keep one"),
        ({"counts": {"a": 1}, "until": "all"}, "remove until"),
        ({"until": "all"}, "strategy: interleave"),
    ],
)
def test_specs_that_mean_nothing_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MixSpec(**fields)


@pytest.mark.parametrize(
    ("fields", "sizes", "message"),
    [
        ({"weights": {"set0": 1, "stet1": 1}}, [1, 1], "'stet1' is no training set; did you mean 'set1'"),
        ({"weights": {"set0": 1}}, [1, 1], "'set1' has none"),
        ({"counts": {"other": 1}}, [1, 1], "data.mix.counts: 'other' is no training set"),
        ({"strategy": "interleave", "probabilities": (1.0,)}, [1, 1], "there are 1 for 2 training sets"),
        ({"strategy": "interleave", "until": "all"}, [1, 0], "'set1' has no samples"),
        ({"strategy": "interleave", "until": "all", "probabilities": (1.0, 0.0)}, [1, 1], "never be used up"),
        ({"temperature": 2}, None, "not known in a stream"),
        ({"counts": {"set0": 2}}, None, "'set1' has none"),
    ],
)
def test_specs_that_do_not_fit_the_sets_are_refused(
    fields: dict[str, Any], sizes: list[int] | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        next(turns(MixSpec(**fields), ["set0", "set1"], sizes, seed=0, epoch=0))
