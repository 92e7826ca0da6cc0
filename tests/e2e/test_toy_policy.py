"""A tiny policy reaches the best return that there is, by ppo and by grpo; learning the wrong way round it does not."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from luthier.stages.grpo import GroupRelative
from luthier.stages.ppo import Proximal

SCRIPT = Path(__file__).parents[2] / "examples" / "toy" / "echo.py"
STAGES = {"grpo": GroupRelative, "ppo": Proximal}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def echo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("echo", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Matrices of 64 x 64 gain nothing from a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_the_best_return_is_reached(stage: str, seed: int, echo: ModuleType) -> None:
    """Sampled answers, one to each of the eight letters: all of them right, with nothing behind."""
    assert echo.returns(stage, seed, quiet=True) == 1.0


@pytest.mark.parametrize("stage", STAGES)
def test_with_advantages_turned_round_it_unlearns(
    stage: str, echo: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = STAGES[stage].signals

    def wrong(self: Any, *args: Any) -> dict[str, torch.Tensor]:
        signals = right(self, *args)
        return {**signals, "advantages": -signals["advantages"]}

    monkeypatch.setattr(STAGES[stage], "signals", wrong)
    assert echo.returns(stage, 0, steps=60, quiet=True) < 0
