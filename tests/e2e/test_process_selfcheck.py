"""The line "2 processes = 1" of `luthier selfcheck`: it holds, a planted fault fails it, and it ends in any case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from luthier.selfcheck import process_check
from luthier.selfcheck.outcome import Outcome
from luthier.selfcheck.verb import selfcheck
from tests.compared import recipe_for, sharp_model

pytestmark = pytest.mark.slow

HALF = """
import sys
from pathlib import Path
from luthier.selfcheck.process_worker import main
from luthier.trainer import trainer
divided = trainer._divided
trainer._divided = lambda *given: divided(*given) / 2
sys.exit(main(Path(sys.argv[1])))
"""
"""A process whose loss is scaled wrongly."""
ALONE = """
import sys
from pathlib import Path
from luthier.selfcheck.process_worker import main
from luthier.trainer import evaluation
from luthier.trainer.processes import ALONE
observe = evaluation.observe
from luthier.trainer import trainer
trainer.observe = lambda *given: observe(*given[:-1])
sys.exit(main(Path(sys.argv[1])))
"""
"""A process that estimates kto's divergence from its own rows."""


def recipe(folder: Path, stage: str = "kto") -> dict[str, Any]:
    return recipe_for(stage, folder, sharp_model(folder / "model"), rows=(7, 6))


def checked(recipe: dict[str, Any]) -> Outcome:
    (outcome,) = selfcheck(recipe, only=["processes"], quiet=True).outcomes
    return outcome


@pytest.mark.parametrize("stage", ["kto", "dpo"])
def test_two_processes_are_one(stage: str, tmp_path: Path) -> None:
    """Of seven rows one process has a pass more than the other."""
    outcome = checked(recipe(tmp_path, stage))
    assert outcome.holds and not outcome.left_out, outcome.detail
    assert 0 < outcome.measured < 2e-5


@pytest.mark.parametrize(
    ("worker", "least"), [(HALF, 0.49), (ALONE, 1e-3)], ids=["scaling", "own statistics"]
)
def test_a_planted_fault_is_seen(
    worker: str, least: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_check, "WORKER", ("-c", worker))
    outcome = checked(recipe(tmp_path))
    assert not outcome.holds
    assert least < outcome.measured < 2


def test_a_process_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = (
        "import os, sys, time; sys.exit('no such device') if os.environ['RANK'] == '1' else time.sleep(99)"
    )
    monkeypatch.setattr(process_check, "WORKER", ("-c", worker))
    outcome = checked(recipe(tmp_path))
    assert not outcome.holds
    assert outcome.detail == "process 1 failed: no such device"


def test_processes_that_say_nothing_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_check, "WORKER", ("-c", "import time; time.sleep(99)"))
    monkeypatch.setattr(process_check, "LIMIT", 0.5)
    outcome = checked(recipe(tmp_path))
    assert not outcome.holds
    assert "the processes had said nothing" in outcome.detail


def test_it_is_left_out_where_it_cannot_be_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = recipe(tmp_path)
    sharded = checked({**base, "parallel": {"type": "fsdp2"}})
    assert sharded.left_out and sharded.detail == "measured for parallel: ddp, and this is fsdp2"
    monkeypatch.setenv("RANK", "0")
    inner = checked(base)
    assert inner.left_out and inner.detail == "this is one of several processes itself"
