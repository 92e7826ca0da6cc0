"""Models and recipes that compare answers, for whole runs of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.compared import padding_model, recipe_for, sharp_model


@pytest.fixture(scope="session")
def sharp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sharp_model(tmp_path_factory.mktemp("sharp"))


@pytest.fixture(scope="session")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return padding_model(tmp_path_factory.mktemp("bloom"))


@pytest.fixture
def make(sharp: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Makes the recipe of a stage, with sections changed."""

    def made(stage_name: str, /, **sections: dict[str, Any]) -> dict[str, Any]:
        return recipe_for(stage_name, tmp_path, sharp, **sections)

    return made
