"""Two launchers on loopback, as on two machines: the same run as one process, also where one of them dies."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
import torch

import luthier
from tests.launching import (
    assert_intact,
    free_port,
    launch_recipe,
    luthier_words,
    start,
    until,
    weights,
)

ENDS_WITHIN = 240.0
"""Seconds until a run of two machines has ended, on a machine that is busy with other things."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, whose steps take the rows of both machines."""
    return luthier.train(launch_recipe(tmp_path_factory.mktemp("one"), rows_per_device=4), quiet=True).output


def assert_close(run: Path, other: Path) -> None:
    expected, found = weights(other), weights(run)
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    for name, tensor in found.items():
        assert torch.allclose(tensor, expected[name], atol=1e-5 * largest, rtol=0), name


def node(recipe: Path, number: int, meeting: list[str], **environment: str) -> subprocess.Popen[bytes]:
    words = luthier_words("train", str(recipe), "--nodes", "2", "--processes", "1", *meeting)
    folder = recipe.parent
    own = {"FAULT_DONE": str(folder / "done"), **environment}
    return start(words, folder / f"node-{number}.log", **own)


def said(recipe: Path, number: int) -> str:
    return (recipe.parent / f"node-{number}.log").read_text()


def rendezvous(*words: str) -> list[str]:
    return ["--rendezvous", f"127.0.0.1:{free_port()}", "--run-id", "test", *words]


def test_two_machines_are_one_process(one: Path, tmp_path: Path) -> None:
    recipe, port = launch_recipe(tmp_path), free_port()
    nodes = [
        node(recipe, number, ["--master", f"127.0.0.1:{port}", "--node-rank", str(number)])
        for number in (1, 0)
    ]
    assert [process.wait(ENDS_WITHIN) for process in nodes] == [0, 0], said(recipe, 0)
    assert_close(tmp_path / "run", one)
    # Machine 0 holds process 0, which alone tells how far it is.
    assert "step 5/5 | loss" in said(recipe, 0) and "step 5/5 | loss" not in said(recipe, 1)


def test_a_machine_that_is_killed_and_comes_back(one: Path, tmp_path: Path) -> None:
    recipe, meeting = launch_recipe(tmp_path), rendezvous("parallel.max_restarts=2")
    first = node(recipe, 0, meeting)
    until(lambda: "preparing the data" in said(recipe, 0), ENDS_WITHIN, "the first machine is not there")
    # It hosts the meeting, so the other one waits for it. Whichever has process 1 is not to be the host.
    second = node(recipe, 1, meeting, FAULT="kill-node:1:3")
    assert second.wait(ENDS_WITHIN) == -signal.SIGKILL, said(recipe, 1)
    assert_intact(tmp_path / "run", at_least=2)
    again = node(recipe, 2, meeting)
    assert [process.wait(ENDS_WITHIN) for process in (first, again)] == [0, 0], said(recipe, 0)
    assert_close(tmp_path / "run", one)
    everything = said(recipe, 0) + said(recipe, 2)
    assert "starting again" in said(recipe, 0)
    assert "this launch was begun before; going on from its newest checkpoint" in everything
    assert "resuming from" in everything


def test_machines_with_different_recipes_are_told_what_differs(tmp_path: Path) -> None:
    recipe, meeting = launch_recipe(tmp_path), rendezvous()
    nodes = [node(recipe, 0, [*meeting, "optim.lr=0.5"]), node(recipe, 1, [*meeting, "optim.lr=0.25"])]
    assert [process.wait(ENDS_WITHIN) for process in nodes] == [2, 2], said(recipe, 0)
    for number in (0, 1):
        assert "process 1 is not part of the run that process 0 is in: optim.lr is 0." in said(recipe, number)
    assert not (tmp_path / "run").exists()
