"""A checkpoint of two processes, taken in the middle of an epoch, goes on in one and in three as if nothing had been.

Three do not divide a step's rows evenly. The rows that each process trains on at each step are written down.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import luthier
from luthier.trainer.snapshot import random_file
from tests import ddp, processes
from tests.compared import sharp_model
from tests.invariant.test_ddp import TOLERANCE, weights_apart
from tests.online import logged

pytestmark = pytest.mark.slow

AT, STEPS = 2, 4
"""Where the checkpoint is; an epoch of 21 rows has four steps of six, the last one of three."""
NAMES = [f"{stage}-{rule}" for stage in ("sft", "dpo") for rule in ("rows", "tokens")]


def recipes(folder: Path) -> dict[str, dict[str, Any]]:
    base, found = sharp_model(folder / "model"), dict[str, dict[str, Any]]()
    for name in NAMES:
        stage, rule = name.split("-")
        one = ddp.recipe(folder / name, base, stage, ddp.LORA)
        one["train"] |= {"accumulation": 6, "epochs": 1, "save_every": AT, "eval_every": None}
        if rule == "tokens":
            del one["train"]["rows_per_device"], one["train"]["accumulation"]
            one["train"]["tokens_per_batch"] = 220 if stage == "sft" else 300
        found[name] = one
    found["dropout"] = ddp.recipe(folder / "dropout", base, "sft", {**ddp.LORA, "dropout": 0.3})
    found["dropout"]["train"] |= {"accumulation": 6, "epochs": 1, "save_every": AT, "eval_every": None}
    return found


def goes_on(one: Mapping[str, Any], left: Path, output: Path, count: int) -> dict[str, Any]:
    """The recipe in a run directory that was left after the checkpoint."""
    output.mkdir(parents=True)
    for name in ("recipe.yaml", "trainer_log.jsonl"):
        shutil.copy(left / name, output / name)
    shutil.copytree(left / f"checkpoint-{AT}", output / f"checkpoint-{AT}")
    return ddp.shared_out(dict(one), output, count, resume="auto")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one`, `two` and `three` hold each run of so many processes; the last ones, and `again`, go on from `two`."""
    folder = tmp_path_factory.mktemp("resume")
    torch.set_num_threads(1)
    made = recipes(folder)
    two = {name: ddp.shared_out(one, folder / "two" / name, 2) for name, one in made.items()}
    change = dict.fromkeys(NAMES, ddp.seen) | {"dropout": ddp.draws}
    said = processes.train_in_processes([(run, change[name]) for name, run in two.items()], folder / "said")
    assert said == [[""] * len(two)] * 2
    for name in NAMES:
        luthier.train(ddp.shared_out(made[name], folder / "straight" / name, 1), quiet=True)
        with ddp.seen(0):
            luthier.train(goes_on(made[name], folder / "two" / name, folder / "one" / name, 1), quiet=True)
    three = [
        (goes_on(made[name], folder / "two" / name, folder / "three" / name, 3), change[name])
        for name in made
    ]
    again = processes.train_in_processes(three, folder / "said three", 3)
    assert again == [[""] * len(three)] * 3
    return folder


def losses(run: Path) -> dict[int, float]:
    return {line["current_steps"]: line["loss"] for line in logged(run) if "loss" in line}


def rows_seen(run: Path, first: int, last: int) -> Counter[tuple[str, int]]:
    """How often each row was trained on in steps [first, last), by any process."""
    seen: Counter[tuple[str, int]] = Counter()
    for file in run.glob("seen-*.jsonl"):
        for line in file.read_text().splitlines():
            step, rows = json.loads(line)
            if first <= step < last:
                seen.update(tuple(row) for row in rows if row[1] >= 0)
    return seen


@pytest.mark.parametrize("count", ["one", "three"])
@pytest.mark.parametrize("name", NAMES)
def test_losses_go_on_and_each_row_is_seen_once(name: str, count: str, folder: Path) -> None:
    straight, found = folder / "straight" / name, folder / count / name
    expected = losses(straight)
    assert len(expected) > AT + 1
    assert losses(found) == pytest.approx(expected, rel=TOLERANCE)
    assert weights_apart(found, straight) < TOLERANCE
    seen = rows_seen(folder / "two" / name, 0, AT) + rows_seen(found, AT, 99)
    assert len(seen) == ddp.ROWS and set(seen.values()) == {1}
    assert rows_seen(folder / "two" / name, 0, 99) == seen


def test_processes_drop_other_places_and_go_on_drawing(folder: Path) -> None:
    """Of three, two go on with what they would have drawn, and the third begins."""

    def numbers(count: str, rank: int) -> list[float]:
        file = folder / count / "dropout" / f"draws-{rank}.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()]

    first, second = numbers("two", 0), numbers("two", 1)
    assert len({*first, *second}) == 2 * STEPS
    ranks = [numbers("three", rank) for rank in range(3)]
    assert [ranks[0][0], ranks[1][0]] == [first[AT], second[AT]]
    assert ranks[2][0] not in {*first, *second}


def test_states_of_generators_are_found_whatever_the_count(folder: Path) -> None:
    two, one = (
        folder / "two" / "dropout" / f"checkpoint-{AT}",
        folder / "straight" / "sft-rows" / "checkpoint-2",
    )
    names = [
        [None if file is None else file.name for file in (random_file(at, 0), random_file(at, 1))]
        for at in (two, one)
    ]
    assert names == [["rng_state_0.pth", "rng_state_1.pth"], ["rng_state.pth", None]]
    assert random_file(two, 2) is None
