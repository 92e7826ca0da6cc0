"""Every bad input of `tests/bad_inputs`: the exact message, the exit status, and nothing written."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import bad_inputs
import luthier.run  # noqa: F401  what it says while it is imported belongs to no command
from bad_inputs import BadInput
from luthier.cli import app

MODULES = [name for _, name, _ in pkgutil.iter_modules(bad_inputs.__path__)]


def cases() -> list[tuple[str, BadInput]]:
    found: list[tuple[str, BadInput]] = []
    for name in MODULES:
        module = importlib.import_module(f"bad_inputs.{name}")
        found += [(f"{name}: {case.name}", case) for case in module.CASES]
    return found


CASES = dict(cases())


def lay_out(folder: Path, case: BadInput) -> None:
    for name, content in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder: files with their bytes, folders with none."""
    found = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in found}


def test_the_tables_are_found_and_no_name_is_taken_twice() -> None:
    assert "recipes" in MODULES
    assert len(CASES) == len(cases())
    assert len([name for name in CASES if name.startswith("recipes: ")]) >= 60


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LUTHIER_TRACEBACK", raising=False)
    lay_out(tmp_path, case)
    before = contents(tmp_path)
    result = CliRunner().invoke(app, [word.replace("{dir}", str(tmp_path)) for word in case.words])
    assert result.stderr == case.message.replace("{dir}", str(tmp_path))
    assert result.exit_code == case.status
    assert contents(tmp_path) == before
