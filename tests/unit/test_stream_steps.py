"""Steps of a stream: the same samples whoever reads them, and wherever it was stopped."""

from __future__ import annotations

import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from luthier.data.batching import RowsRule, TokensRule, plan_epoch
from luthier.data.packing import best_fit
from luthier.data.row_stream import StreamSet
from luthier.data.streaming import BLOCK
from luthier.recipe.mixture import MixSpec
from luthier.types import CheckpointError, DataError
from tests.numbered import Numbers
from tests.streams import Together, sets_of, steps_of, stream_of, taken, write_lines

BATCHES = [RowsRule(3), RowsRule(2, 3), TokensRule(40)]


@pytest.fixture
def sets(tmp_path: Path) -> list[StreamSet]:
    return sets_of(write_lines(tmp_path / "a.jsonl", 700), write_lines(tmp_path / "b.jsonl", 310))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[StreamSet]:
    folder = tmp_path_factory.mktemp("small")
    return sets_of(write_lines(folder / "a.jsonl", 400), write_lines(folder / "b.jsonl", 111))


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_stopped_anywhere_it_goes_on_with_the_same_samples(
    small: list[StreamSet], data: st.DataObject
) -> None:
    """Mixture, packing, buffers and rows that are dropped; over the ends of epochs; stopped twice."""
    stream = stream_of(
        small,
        buffer=data.draw(st.sampled_from([1, 7, 100, 1000])),
        seed=data.draw(st.integers(0, 3)),
        mix=data.draw(st.sampled_from([MixSpec(), MixSpec(strategy="interleave", until="all")])),
        packing=data.draw(st.sampled_from(["no", "groups", "llamafactory"])),
        encode=Numbers(most=9, lost=data.draw(st.sampled_from([0, 4]))),
    )
    rule = data.draw(st.sampled_from(BATCHES))
    steps = steps_of(stream, rule)
    whole = list(taken(steps, 0, 200))
    numbers = steps.numbers()
    steps.close()
    at = sorted(data.draw(st.lists(st.integers(1, 199), min_size=2, max_size=2, unique=True)))
    found, state = [], dict[str, Any]()
    for first, last in ((0, at[0]), (at[0], at[1]), (at[1], 200)):
        part = steps_of(stream, rule)
        part.begin(json.loads(json.dumps(state)) or None, first)
        found += list(taken(part, first, last - first))
        state = part.state(last)
        assert last < 200 or part.numbers() == numbers
        part.close()
    assert found == whole


@pytest.mark.parametrize("rule", BATCHES, ids=str)
def test_unshuffled_it_is_the_order_of_a_table(sets: list[StreamSet], rule: RowsRule | TokensRule) -> None:
    """Buffer 1 and concatenation: what `plan_epoch` makes of the same samples without shuffling, epoch by epoch."""
    numbers = [*range(700), *range(310)]
    lengths = [1 + number % 9 for number in numbers]
    plan = plan_epoch(lengths, rule=rule, epoch=0, seed=0, shuffle=False)
    expected = [[numbers[i] for batch in step for i in batch] for step in plan.units]
    steps = steps_of(stream_of(sets), rule)
    found = [[index for _, index, _ in step] for step in taken(steps, 0, 2 * len(expected))]
    steps.close()
    assert found == expected * 2


def test_packed_it_is_the_packing_of_a_thousand_rows(tmp_path: Path) -> None:
    sets = sets_of(write_lines(tmp_path / "a.jsonl", 1300))
    lengths = [1 + number % 9 for number in range(1300)]
    groups = [
        [first + i for i in group]
        for first, last in ((0, 1000), (1000, 1300))
        for group in best_fit(lengths[first:last], 16)
    ]
    steps = steps_of(stream_of(sets, packing="groups"), RowsRule(1))
    found = [[index for _, index, _ in step] for step in taken(steps, 0, len(groups))]
    steps.close()
    assert found == groups


def test_two_workers_are_one(sets: list[StreamSet]) -> None:
    """Streaming, a mixture, packing and stopped with one process that tokenizes, and gone on with two."""
    settings: dict[str, Any] = {
        "buffer": 300,
        "mix": MixSpec(strategy="interleave", until="all"),
        "packing": "groups",
    }
    one, two = stream_of(sets, **settings), stream_of(sets, workers=2, **settings)
    steps = steps_of(one)
    whole = list(taken(steps, 0, 600))  # two epochs and a half
    steps.close()
    steps = steps_of(one)
    found, state = list(taken(steps, 0, 333)), steps.state(333)
    steps.close()
    steps = steps_of(two)
    steps.begin(state, 333)
    found += list(taken(steps, 333, 267))
    assert found == whole
    assert steps.numbers()["stream_epoch"] >= 1
    steps.close()


def _of_processes(stream: Any, rule: Any, count: int, first: int, steps: int, state: Any) -> tuple[Any, Any]:
    """What each process has of each step, by (step, rank); and the state after it."""
    together, found, states = Together(count), dict[tuple[int, int], Any](), dict[int, Any]()

    def run(rank: int) -> None:
        part = steps_of(
            stream,
            rule,
            rank=rank,
            num_processes=count,
            exchange=together.exchange_of(rank),
            tokens_per_pass=20,
        )
        part.begin(state, first)
        for step, samples in enumerate(taken(part, first, steps), start=first):
            found[step, rank] = samples
        states[rank] = part.state(first + steps)
        part.close()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == steps * count
    assert all(states[rank] == states[0] for rank in range(count))
    return found, json.loads(json.dumps(states[0]))


def test_processes_share_a_step_as_one_takes_it(sets: list[StreamSet]) -> None:
    """By tokens a step has the same samples however many processes there are, each sample with one of them."""
    stream, rule = stream_of(sets, buffer=64), TokensRule(50)
    whole, _ = _of_processes(stream, rule, 1, 0, 150, None)
    for count in (2, 3):
        shared, _ = _of_processes(stream, rule, count, 0, 150, None)
        for step in range(150):
            parts = [[s for s in shared[step, rank] if len(s[2]) > 0] for rank in range(count)]
            real = [sample for part in parts for sample in part]
            extra = Counter(real) - Counter(whole[step, 0])
            assert not Counter(whole[step, 0]) - Counter(real)
            # what a process without work is given to do is one token of the step's first sample
            assert all(len(tokens) == 1 for _, _, tokens in extra)


@pytest.mark.parametrize("rule", [RowsRule(2, 2), TokensRule(50)], ids=str)
def test_another_number_of_processes_in_the_middle_of_an_epoch(sets: list[StreamSet], rule: Any) -> None:
    """1, then 2, then 3 processes: every sample comes exactly once in an epoch."""
    stream, state, first, seen = stream_of(sets, buffer=64, encode=Numbers(most=9)), None, 0, Counter[Any]()
    every = Counter([("a", i) for i in range(700)] + [("b", i) for i in range(310)])
    for count, steps in ((1, 30), (2, 20), (3, 400)):
        found, state = _of_processes(stream, rule, count, first, steps, state)
        for step in range(first, first + steps):
            if sum(seen.values()) == 1010:
                break
            for rank in range(count):
                # what a process without work is given to do has row -1
                seen.update((source, index) for source, index, _ in found[step, rank] if index >= 0)
        first += steps
    assert seen == every


def test_what_is_lost_is_counted_and_judged_on_the_way(tmp_path: Path) -> None:
    sets = sets_of(write_lines(tmp_path / "a.jsonl", 5000))
    steps = steps_of(stream_of(sets, encode=Numbers(lost=50, least=2)), RowsRule(10), max_lost=0.03)
    list(taken(steps, 0, 490))
    (report,) = steps.reports()
    steps.close()
    assert (report.rows, report.samples, report.dropped) == (5000, 4900, {"unlucky": 100})
    assert report.examples == {"unlucky": [0, 50, 100]}
    assert steps.numbers() == {"stream_epoch": 0, "stream_rows": 5000, "stream_lost": 100}

    worse = steps_of(stream_of(sets, encode=Numbers(lost=20, least=2)), RowsRule(10), max_lost=0.03)
    with pytest.raises(
        DataError, match=r"a: 50 of 1000 rows lost: 50 dropped \(unlucky; row 0, 20, 40\).*max_lost"
    ):
        list(taken(worse, 0, 400))
    assert worse.numbers()["stream_rows"] == 1000  # not before a thousand rows say something
    worse.close()


def test_a_row_that_cannot_be_read_ends_the_run_where_it_comes(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", 900)
    lines = file.read_text().splitlines()
    lines[601] = lines[601][:-1]
    file.write_text("\n".join(lines))
    steps = steps_of(stream_of(sets_of(file)), RowsRule(10))
    assert len(list(taken(steps, 0, 2 * BLOCK // 10))) == 50  # the blocks before it
    with pytest.raises(DataError, match=r"a.jsonl, line 602, column 1: not JSON"):
        steps[50]
    steps.close()


def test_nothing_to_train_on_is_said_after_an_epoch(tmp_path: Path) -> None:
    steps = steps_of(stream_of(sets_of(write_lines(tmp_path / "a.jsonl", 30)), encode=Numbers(lost=1)))
    with pytest.raises(DataError, match=r"nothing to train on: no row of a gives a sample"):
        steps[0]
    steps.close()


def test_a_checkpoint_without_a_stream_is_refused(tmp_path: Path) -> None:
    steps = steps_of(stream_of(sets_of(write_lines(tmp_path / "a.jsonl", 30))))
    with pytest.raises(CheckpointError, match=r"was written without data.stream"):
        steps.begin({"loss_sum": 1.0}, 4)


def test_epochs_end_where_their_rows_do(tmp_path: Path) -> None:
    steps = steps_of(stream_of(sets_of(write_lines(tmp_path / "a.jsonl", 10))), RowsRule(4))
    sizes = [len(step) for step in taken(steps, 0, 7)]
    steps.close()
    assert sizes == [4, 4, 2, 4, 4, 2, 4]
    assert [step for step in range(8) if steps.ends_epoch(step)] == [3, 6]


def test_passes_can_be_cut_anew(tmp_path: Path) -> None:
    steps = steps_of(
        stream_of(sets_of(write_lines(tmp_path / "a.jsonl", 100))), RowsRule(8), tokens_per_pass=40
    )
    first: list[Any] = steps[0]
    steps.limit_passes(9)
    again: list[Any] = steps.again(0)
    steps.close()
    flat = [[sample for batch in batches for sample in batch] for batches in (first, again)]
    assert Counter(flat[0]) == Counter(flat[1])
    assert (len(first), len(again)) == (1, 4)
    assert all(sum(len(tokens) for *_, tokens in batch) <= 9 for batch in again)
