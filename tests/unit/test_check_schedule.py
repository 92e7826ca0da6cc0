"""Steps and passes of a plan, against counting by hand."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from luthier.check.findings import histogram_of
from luthier.check.memory import PassShape
from luthier.check.schedule import EXAMINED, longest_shape, pass_positions, schedule_of
from luthier.data.batching import RowsRule, TokensRule, plan_epoch
from luthier.data.collate import flat_batch
from luthier.data.table import SampleTable
from luthier.recipe.schema import TrainSpec
from luthier.trainer.steps import StepDataset
from luthier.types import IGNORE_INDEX
from tests.tiny import random_samples

LENGTHS = [10, 20, 30, 40, 5, 15]


def steps_of(lengths: list[int], rule: RowsRule | TokensRule, **how: Any) -> StepDataset:
    samples = random_samples(lengths)
    plan = partial(_plan, lengths, rule, how)
    return StepDataset(samples, plan, flat_batch, 0)


def _plan(lengths: list[int], rule: RowsRule | TokensRule, how: dict[str, Any], epoch: int) -> Any:
    return plan_epoch(lengths, rule=rule, epoch=epoch, seed=0, shuffle=False, **how)


def test_rows_by_hand() -> None:
    steps = steps_of(LENGTHS, RowsRule(2, 2))
    schedule = schedule_of(steps, TrainSpec(rows_per_device=2, accumulation=2, epochs=2.5))
    assert (schedule.steps_per_epoch, schedule.steps, schedule.epochs) == (2, 5, 2.5)
    assert (schedule.tokens_per_epoch, schedule.tokens_per_step) == (120, 60)
    assert (schedule.least_tokens, schedule.most_tokens) == (20, 100)
    assert (schedule.passes_per_step, schedule.several_passes) == (1.5, True)
    assert (schedule.longest_pass, schedule.longest_at) == (70, (0, 1))
    assert schedule.padding_share == 0


def test_padded_passes_count_their_padding() -> None:
    steps = steps_of(LENGTHS, RowsRule(2, 2), padded=True)
    schedule = schedule_of(steps, TrainSpec(rows_per_device=2, accumulation=2))
    assert schedule.longest_pass == 80
    assert schedule.padding_share == pytest.approx(1 - 120 / (40 + 80 + 30))
    assert pass_positions(steps.plan, [2, 3]) == 80
    assert longest_shape(steps, schedule) == PassShape(80, 2 * 40**2, longest_shape(steps, schedule).targets)


def test_what_answers_take_of_a_pass_decides_over_their_tokens() -> None:
    """A prompt that is computed for each of its answers takes more positions than the data has tokens."""
    steps = steps_of(LENGTHS, RowsRule(2, 2), sizes=np.array([10, 20, 30, 40, 90, 15]))
    schedule = schedule_of(steps, TrainSpec(rows_per_device=2, accumulation=2))
    assert (schedule.longest_pass, schedule.longest_at) == (105, (1, 0))
    assert schedule.tokens_per_epoch == 120


def test_max_steps_decide_over_epochs() -> None:
    schedule = schedule_of(steps_of(LENGTHS, TokensRule(40)), TrainSpec(max_steps=6, epochs=9))
    assert schedule.steps == 6
    assert schedule.epochs == 6 / schedule.steps_per_epoch


def test_passes_that_the_run_does_not_reach_are_not_counted() -> None:
    steps = steps_of([3, 4, 90], RowsRule(1))
    assert schedule_of(steps, TrainSpec(rows_per_device=1, max_steps=2)).longest_pass == 4
    assert schedule_of(steps, TrainSpec(rows_per_device=1, max_steps=3)).longest_pass == 90


def test_a_share_of_an_epoch_is_rounded_up() -> None:
    assert schedule_of(steps_of([4] * 10, RowsRule(1)), TrainSpec(rows_per_device=1, epochs=0.25)).steps == 3


def test_the_longest_pass_has_its_targets() -> None:
    steps = steps_of(LENGTHS, RowsRule(2, 2))
    schedule = schedule_of(steps, TrainSpec(rows_per_device=2, accumulation=2))
    batch = flat_batch(random_samples(LENGTHS)[2:4])
    targets = int((batch.targets != IGNORE_INDEX).sum())
    assert 0 < targets < 70
    assert longest_shape(steps, schedule) == PassShape(70, 30**2 + 40**2, targets)


def test_of_a_long_epoch_some_steps_are_cut_and_all_are_counted() -> None:
    lengths = [3] * (EXAMINED + 500)
    lengths[-1] = 50
    schedule = schedule_of(steps_of(lengths, RowsRule(1)), TrainSpec(rows_per_device=1))
    assert schedule.steps_per_epoch == len(lengths)
    assert schedule.tokens_per_epoch == sum(lengths)
    assert (schedule.longest_pass, schedule.most_tokens) == (50, 50)


@pytest.mark.parametrize("lengths", [[5], [1, 1, 1], list(range(1, 200)), [7, 1000], [3, 4, 5, 26, 27]])
def test_a_histogram_counts_every_sample_once(lengths: list[int]) -> None:
    histogram = histogram_of(np.asarray(lengths, np.int64))
    edges, counts = histogram.edges, histogram.counts
    assert sum(counts) == len(lengths)
    assert len(edges) == len(counts) + 1 <= 25
    assert len(set(np.diff(edges))) == 1
    for place, count in enumerate(counts):
        assert count == sum(edges[place] <= length < edges[place + 1] for length in lengths)


def test_the_lengths_of_a_data_set_are_found_in_a_mixed_table() -> None:
    first, second = random_samples([3, 9, 4]), random_samples([7, 2])
    tables = [SampleTable.of(enumerate(part), name) for part, name in ((first, "a"), (second, "b"))]
    mixed = SampleTable.concat(tables, [3, 2]).take_rows(np.asarray([4, 1, 0]))
    assert mixed.lengths_of("a").tolist() == [9, 3]
    assert mixed.lengths_of("b").tolist() == [2]
    assert mixed.lengths_of("c").tolist() == []
