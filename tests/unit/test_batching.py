"""The plan of an epoch. That its order is the Trainer's is shown in tests/parity/test_row_order.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from luthier.data.batching import EpochPlan, RowsRule, TokensRule, plan_epoch

lengths_of = st.lists(st.integers(1, 50), min_size=1, max_size=60)


def flat(plan: EpochPlan) -> list[int]:
    return [i for step in plan for rank in step for batch in rank for i in batch]


def plan(lengths: Any, rule: RowsRule | TokensRule, **changes: Any) -> EpochPlan:
    return plan_epoch(lengths, rule=rule, **({"epoch": 0, "seed": 1} | changes))


def test_rows_in_order_by_hand() -> None:
    made = plan([1] * 7, RowsRule(rows=2, accumulation=2), shuffle=False)
    assert list(made) == [[[[0, 1], [2, 3]]], [[[4, 5], [6]]]]
    two = plan([1] * 7, RowsRule(rows=2, accumulation=1), shuffle=False, world_size=2)
    assert list(two) == [[[[0, 1]], [[2, 3]]], [[[4, 5]], [[6]]]]
    uneven = plan([1] * 5, RowsRule(rows=2, accumulation=2), shuffle=False, world_size=2)
    assert list(uneven) == [[[[0, 1], [4]], [[2, 3], []]]]


def test_rows_with_groups_take_whole_groups() -> None:
    groups = [[3, 0], [1], [2, 4]]
    made = plan([1] * 5, RowsRule(rows=2), shuffle=False, groups=groups)
    assert list(made) == [[[[3, 0, 1]]], [[[2, 4]]]]


def test_passes_are_cut_by_tokens() -> None:
    lengths = [5, 5, 3, 3, 20]
    made = plan(lengths, RowsRule(rows=5), shuffle=False, tokens_per_pass=8)
    assert made[0] == [[[4], [0, 3], [1, 2]]]
    assert made.tokens(0) == 36


@settings(deadline=None)
@given(lengths_of, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 60) | st.none())
def test_rows_rule(
    lengths: list[int], rows: int, accumulation: int, world_size: int, tokens_per_pass: int | None
) -> None:
    rule = RowsRule(rows, accumulation)
    made = plan(lengths, rule, world_size=world_size, tokens_per_pass=tokens_per_pass)
    one = plan(lengths, RowsRule(rows, accumulation * world_size))
    assert sorted(flat(made)) == list(range(len(lengths)))
    # which samples form a step depends only on the product of the three numbers
    assert [sorted(i for r in step for p in r for i in p) for step in made] == [
        sorted(i for p in step[0] for i in p) for step in one
    ]
    check_passes(made, lengths, world_size, tokens_per_pass)
    assert len(made) == -(-len(lengths) // (rows * accumulation * world_size))


@settings(deadline=None)
@given(lengths_of, st.integers(10, 100), st.integers(1, 3), st.integers(1, 60) | st.none(), st.booleans())
def test_tokens_rule(
    lengths: list[int], tokens: int, world_size: int, tokens_per_pass: int | None, shuffle: bool
) -> None:
    rule = TokensRule(tokens)
    made = plan(lengths, rule, world_size=world_size, tokens_per_pass=tokens_per_pass, shuffle=shuffle)
    alone = plan(lengths, rule, shuffle=shuffle)
    assert sorted(flat(made)) == list(range(len(lengths)))
    for number, step in enumerate(made):
        samples = [i for rank in step for batch in rank for i in batch]
        assert made.tokens(number) == sum(lengths[i] for i in samples)
        assert made.tokens(number) <= tokens or len(samples) == 1
        assert sorted(samples) == sorted(i for batch in alone[number][0] for i in batch)
    check_passes(made, lengths, world_size, tokens_per_pass)
    if not shuffle and world_size == 1 and tokens_per_pass is None:
        assert flat(made) == list(range(len(lengths)))


def check_passes(made: EpochPlan, lengths: list[int], world_size: int, tokens_per_pass: int | None) -> None:
    for step in made:
        assert len(step) == world_size
        assert len({len(rank) for rank in step}) == 1
        assert any(batch for rank in step for batch in rank)
        if tokens_per_pass is not None:
            for batch in (batch for rank in step for batch in rank if batch):
                assert sum(lengths[i] for i in batch) <= tokens_per_pass or len(batch) == 1


@pytest.mark.parametrize("rule", [RowsRule(3, 2), TokensRule(64)])
def test_epochs_differ_in_order_and_agree_in_number(rule: RowsRule | TokensRule) -> None:
    lengths = np.random.default_rng(0).integers(1, 40, 300)
    epochs = [plan(lengths, rule, epoch=e) for e in range(4)]
    assert len({len(made) for made in epochs}) == 1
    assert len({tuple(flat(made)) for made in epochs}) == 4
    assert flat(plan(lengths, rule, epoch=2)) == flat(epochs[2])
    assert flat(plan(lengths, rule, epoch=2, seed=9)) != flat(epochs[2])


def test_token_steps_are_full_and_mix_lengths() -> None:
    lengths = np.random.default_rng(0).integers(20, 600, 3000)
    made = plan(lengths, TokensRule(4096))
    used = [made.tokens(step) for step in range(len(made))]
    assert sum(used) / (4096 * len(made)) > 0.97
    means = [lengths[[i for batch in step[0] for i in batch]].mean() for step in made[:50]]
    assert np.std(means) < 150


def test_slices_and_negative_steps() -> None:
    made = plan([1] * 6, RowsRule(2), shuffle=False)
    assert made[1:] == [made[1], made[2]] and made[-1] == made[2]
    with pytest.raises(IndexError):
        made[3]


@pytest.mark.parametrize("rule", [RowsRule(3, 2), TokensRule(60)])
@pytest.mark.parametrize("world_size", [1, 2])
def test_padded_passes_count_their_padding(rule: RowsRule | TokensRule, world_size: int) -> None:
    lengths = np.random.default_rng(1).integers(1, 30, 80)
    flat, padded = (
        plan_epoch(
            lengths, rule=rule, epoch=1, seed=3, world_size=world_size, tokens_per_pass=40, padded=padded
        )
        for padded in (False, True)
    )
    assert len(flat) == len(padded)
    real = positions = 0
    for flat_step, step in zip(flat, padded, strict=True):
        for flat_rank, rank in zip(flat_step, step, strict=True):
            assert sorted(i for p in rank for i in p) == sorted(i for p in flat_rank for i in p)
            for indices in filter(None, rank):
                width = int(lengths[indices].max())
                assert len(indices) == 1 or len(indices) * width <= 40
                real, positions = real + int(lengths[indices].sum()), positions + len(indices) * width
    assert padded.padding_share() == pytest.approx(1 - real / positions)
    assert 0 < padded.padding_share() < 0.5
    assert flat.padding_share() == 0.0


def test_padding_share_by_hand() -> None:
    plan = plan_epoch([2, 4, 4], rule=RowsRule(3), epoch=0, seed=0, shuffle=False, padded=True)
    assert plan[0] == [[[0, 1, 2]]]
    assert plan.padding_share() == pytest.approx(2 / 12)
    assert plan_epoch([], rule=TokensRule(8), epoch=0, seed=0, padded=True).padding_share() == 0.0
