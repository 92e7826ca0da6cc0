"""What processes tell each other, where one of them is played by this test."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from luthier.trainer.interruption import Interruption
from luthier.trainer.processes import ProcessError, Processes
from luthier.types import CheckpointError, LuthierError


class Played(Processes):
    """Process 0 of two; what the other one says is a list, in the order of exchanges."""

    __slots__ = ("others",)

    def __init__(self, others: Sequence[Any], rank: int = 0) -> None:
        super().__init__(rank, 2, rank)
        object.__setattr__(self, "others", iter(others))

    others: Iterator[Any]

    def exchange(self, own: Any) -> list[Any]:
        other = next(self.others)
        return [own, other] if self.rank == 0 else [other, own]


def test_sums_are_of_names_that_some_lack() -> None:
    found = Played([{"b": (5.0, 1.0), "c": (7.0, 2.0)}]).sums({"a": (1.0, 2.0), "b": (3.0, 4.0)})
    assert found == {"a": (1.0, 2.0), "b": (8.0, 5.0), "c": (7.0, 2.0)}


def test_the_first_alone_works_and_tells() -> None:
    worked = []
    assert Played([None, 7], rank=1).first(lambda: worked.append(1)) == 7
    assert worked == []
    assert Played([None, None]).first(lambda: 7) == 7


def test_an_error_of_ours_is_told_as_it_is() -> None:
    with pytest.raises(CheckpointError, match=r"^process 1: no room$"):
        Played([(CheckpointError, "no room")]).together(lambda: 7)
    with pytest.raises(CheckpointError, match=r"^no such file$"):
        Played([None]).together(fails(CheckpointError("no such file")))


def test_any_other_error_ends_the_others_too() -> None:
    with pytest.raises(ZeroDivisionError):
        Played([None]).together(lambda: 1 // 0)
    told = Recorded([None])
    with pytest.raises(ZeroDivisionError):
        told.together(lambda: 1 // 0)
    ((kind, text),) = told.said
    assert issubclass(kind, LuthierError) and kind is ProcessError
    assert text == "ZeroDivisionError: integer division or modulo by zero"


def test_in_turn_the_first_of_a_machine_comes_before_the_others() -> None:
    order: list[str] = []

    class Watched(Played):
        def exchange(self, own: Any) -> list[Any]:
            order.append("all have come")
            return super().exchange(own)

    for rank, expected in (
        (0, ["work", "all have come", "all have come"]),
        (1, ["all have come", "work", "all have come"]),
    ):
        order.clear()
        Watched([None, None], rank).in_turn(lambda: order.append("work"))
        assert order == expected


def test_what_one_callback_asked_for_all_do() -> None:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    wishes = dict.fromkeys(
        ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log"), False
    )
    control = TrainerControl(should_log=True)
    given: Any = (TrainingArguments, TrainerState)
    Interruption(Played([(None, wishes | {"should_save": True})])).on_step_end(*given, control)
    assert (control.should_save, control.should_log, control.should_training_stop) == (True, True, False)


class Recorded(Played):
    """Keeps what this process says."""

    __slots__ = ("said",)

    def __init__(self, others: Sequence[Any]) -> None:
        super().__init__(others)
        object.__setattr__(self, "said", [])

    said: list[Any]

    def exchange(self, own: Any) -> list[Any]:
        self.said.append(own)
        return super().exchange(own)


def fails(error: Exception) -> Any:
    def work() -> None:
        raise error

    return work
