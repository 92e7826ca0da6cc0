"""Where processes go, what they agree on, what is handed to them, why they ended: values, and no process."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from luthier.launch.failures import find_failure
from luthier.launch.handover import Handover, Outcome, outcomes
from luthier.launch.placement import Meeting, place
from luthier.recipe.load import LoadedRecipe, load_recipe
from luthier.recipe.resolve import resolve
from luthier.trainer.agreement import agree_to_start, remember_launch, require_alike
from luthier.trainer.processes import ALONE, Processes
from luthier.types import DataError, ModelError, ProcessFailed, RecipeError
from tests.training import CPU


def loaded(**sections: Any) -> LoadedRecipe:
    tree = {"model": {"path": "tiny", "token": "secret"}, "data": {"train": ["made"]}, **sections}
    return resolve(load_recipe(tree), CPU)


# --------------------------------------------------------------------------------------------------
# Placement


@pytest.mark.parametrize(
    ("parallel", "num_gpus", "world_size"),
    [({}, 0, 1), ({}, 4, 4), ({"processes": 2}, 4, 2), ({"processes": 3}, 0, 3)],
)
def test_all_visible_gpus_are_the_default(parallel: dict[str, Any], num_gpus: int, world_size: int) -> None:
    assert place(loaded(parallel=parallel).recipe, num_gpus, Meeting()).world_size == world_size


@pytest.mark.parametrize(
    ("parallel", "meeting", "text"),
    [
        ({"processes": 5}, Meeting(), "5, and 4 GPUs are visible"),
        ({"nodes": 2}, Meeting(), "2 machines need to know where they meet"),
        ({"nodes": 2}, Meeting(rendezvous="a:1"), "--run-id NAME"),
        ({"nodes": 2}, Meeting(rendezvous="a", run_id="x"), "--rendezvous a: write HOST:PORT"),
        ({"nodes": 2}, Meeting(master="a:1", node_rank=2), "the numbers of 2 machines are 0 to 1"),
        ({"nodes": 2, "max_restarts": 1}, Meeting(master="a:1", node_rank=0), "only with --rendezvous"),
        ({}, Meeting(master="a:1", node_rank=0), "--master is for several machines"),
    ],
)
def test_what_does_not_fit_is_refused(parallel: dict[str, Any], meeting: Meeting, text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        place(loaded(parallel=parallel).recipe, 4, meeting)
    assert text in str(caught.value)


def test_two_machines_with_all_their_gpus() -> None:
    parallel = {"nodes": 2, "max_restarts": 3}
    placement = place(loaded(parallel=parallel).recipe, 4, Meeting(rendezvous="node-0:29500", run_id="x"))
    assert (placement.world_size, placement.endpoint, placement.run_id) == (8, "node-0:29500", "x")
    assert placement.address is None  # the machine's own name
    assert place(loaded().recipe, 2, Meeting()).endpoint == "localhost:0"


# --------------------------------------------------------------------------------------------------
# Handing over


def test_a_worker_reads_the_very_recipe_and_nobody_else_can(tmp_path: Path) -> None:
    recipe = loaded(
        stage={"type": "dpo", "loss": "ipo"},
        method={"type": "lora", "targets": ["q_proj", "v_proj"]},
        parallel={"type": "fsdp2", "processes": 2},
    )
    Handover(recipe, True, 3).write(tmp_path)
    read = Handover.read(tmp_path)
    assert read.loaded == recipe and (read.quiet, read.threads) == (True, 3)
    assert read.loaded.recipe.model.token == "secret"


# --------------------------------------------------------------------------------------------------
# Agreement


class Together(Processes):
    """Processes that are threads."""

    __slots__ = ("barrier", "given")

    def exchange(self, own: Any) -> list[Any]:
        self.given[self.rank] = own
        self.barrier.wait(5)
        found = list(self.given)
        self.barrier.wait(5)
        return found


def in_threads(work: Any, values: Sequence[Any]) -> list[Any]:
    """What `work` gives, or raises, in a thread for each value."""
    barrier, given = Barrier(len(values)), [None] * len(values)

    def one(rank: int) -> Any:
        processes = Together(rank, len(values))
        object.__setattr__(processes, "barrier", barrier)
        object.__setattr__(processes, "given", given)
        try:
            return work(processes, values[rank])
        except RecipeError as error:
            return str(error)

    with ThreadPoolExecutor(len(values)) as pool:
        return list(pool.map(one, range(len(values))))


def test_the_process_that_differs_is_named_with_what_differs() -> None:
    alike, other = {"train.seed": 1, "torch": "2.13"}, {"train.seed": 2, "torch": "2.13", "data": "x"}
    assert in_threads(require_alike, [alike, dict(reversed(alike.items()))]) == [None, None]
    text = (
        'process 2 is not part of the run that process 0 is in: data is "x" there and absent here; train.seed is 2 '
        "there and 1 here. All machines need the same recipe, data, model and versions"
    )
    assert in_threads(require_alike, [alike, alike, other]) == [text] * 3


def test_where_things_are_may_differ_and_what_they_are_may_not() -> None:
    here = loaded(data={"train": ["made"], "directory": "/a", "cache": "/b", "workers": 1})
    there = loaded(data={"train": ["made"], "directory": "/c", "cache": "/d", "workers": 2})
    work = lambda processes, value: agree_to_start(value, processes)  # noqa: E731
    assert in_threads(work, [here, there]) == [here, there]
    other = loaded(optim={"type": "adamw", "lr": 0.5}, data=here.recipe.data.model_dump())
    for text in in_threads(work, [here, other]):
        assert "process 1 is not part" in text and "optim.lr is 0.5 there and 0.0001 here" in text


def test_a_launch_that_is_begun_again_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = loaded(train={"output": str(tmp_path), "overwrite": True})
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    assert agree_to_start(recipe, ALONE) == recipe
    remember_launch(tmp_path)
    again = agree_to_start(recipe, ALONE)
    assert (again.recipe.train.resume, again.recipe.train.overwrite) == ("auto", False)
    assert again.notes == (*recipe.notes, "this launch was begun before; going on from its newest checkpoint")
    for name in ("second", "none"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        assert agree_to_start(recipe, ALONE) == recipe
    remember_launch(tmp_path)  # of no launch: not of the first one any more
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    assert agree_to_start(recipe, ALONE) == recipe


# --------------------------------------------------------------------------------------------------
# Failures

LOST = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"
WAITED = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 9000ms for recv"
)


def test_the_first_failure_is_told_and_not_what_it_led_to(tmp_path: Path) -> None:
    now = time.time()
    Outcome(0, "RuntimeError", LOST, at=now).write(tmp_path)
    Outcome(1, "DataError", "row 7", luthier=True, at=now + 1).write(tmp_path)
    Outcome(2, "ModelError", "later", luthier=True, at=now + 2).write(tmp_path)
    failure = find_failure(tmp_path, {0: 1, 1: 1}, {}, 9)
    assert type(failure.error) is DataError and str(failure.error) == "process 1: row 7"
    assert not failure.may_pass


def test_what_all_say_is_said_once(tmp_path: Path) -> None:
    for rank in (0, 1):
        Outcome(rank, "ModelError", "no such folder", luthier=True).write(tmp_path)
    failure = find_failure(tmp_path, {0: 1, 1: 1}, {}, 9)
    assert type(failure.error) is ModelError and str(failure.error) == "no such folder"


def test_a_bug_shows_its_own_traceback(tmp_path: Path) -> None:
    Outcome(1, "KeyError", "'x'", trace="Traceback ...\nKeyError: 'x'\n").write(tmp_path)
    failure = find_failure(tmp_path, {1: 1}, {}, 9)
    assert str(failure.error) == "process 1 failed.\nTraceback ...\nKeyError: 'x'" and failure.may_pass


def test_a_killed_process_is_named_with_its_last_words(tmp_path: Path) -> None:
    Outcome(0, "RuntimeError", LOST).write(tmp_path)
    words = tmp_path / "stderr.log"
    words.write_text("\n".join(f"line {number}" for number in range(50)))
    failure = find_failure(tmp_path, {0: 1, 1: -signal.SIGSEGV, 2: -signal.SIGTERM}, {1: words}, 9)
    said = str(failure.error).splitlines()
    assert said[0] == "process 1 was killed by SIGSEGV"
    assert said[1:] == [f"line {number}" for number in range(30, 50)]


def test_a_process_that_hangs_is_named_with_where(tmp_path: Path) -> None:
    Outcome(0, "RuntimeError", WAITED).write(tmp_path)
    (tmp_path / "stack-1.txt").write_text("File train.py, line 3 in well\n")
    failure = find_failure(tmp_path, {0: 1, 1: 1}, {}, 9)
    assert str(failure.error) == (
        "process 0 waited 9 s (parallel.timeout) in vain for process 1\nprocess 1 was here:\n"
        "File train.py, line 3 in well"
    )


def test_a_machine_that_lost_another_says_so(tmp_path: Path) -> None:
    Outcome(0, "DistBackendError", f"{LOST}\nmore").write(tmp_path)
    failure = find_failure(tmp_path, {0: 1}, {}, 9)
    assert type(failure.error) is ProcessFailed and failure.may_pass
    assert (
        str(failure.error) == f"process 0 lost another one, on another machine: its launcher says why. {LOST}"
    )


def test_outcomes_are_read_as_they_were_written(tmp_path: Path) -> None:
    told = [Outcome(1, metrics={"loss": 1.5}, at=2.0), Outcome(0, at=3.0)]
    for outcome in told:
        outcome.write(tmp_path)
    assert outcomes(tmp_path) == told
    assert json.loads((tmp_path / "outcome-1.json").read_text())["metrics"] == {"loss": 1.5}


def test_auto_may_be_written_and_nothing_below_one() -> None:
    assert loaded(parallel={"processes": "auto"}).recipe.parallel.processes == "auto"
    with pytest.raises(RecipeError, match=r"parallel\.processes"):
        loaded(parallel={"processes": 0})
