"""Imports go strictly downward: the contract in pyproject.toml, held by import-linter."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("lint-imports")
    environment = os.environ | {"PYTHONPATH": str(folder / "src")}
    return subprocess.run(
        [str(program), "--no-cache"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_imports_go_strictly_downward() -> None:
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Imports go strictly downward KEPT" in result.stdout


def test_the_contract_names_every_row_of_the_house() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (contract,) = settings["contracts"]
    assert contract["exhaustive"], "a new package must be given its place in the house"
    named = {name.strip(" ()") for row in contract["layers"] for name in row.split("|")}
    there = {path.stem for path in (ROOT / "src/luthier").glob("*.py")} | {
        path.parent.name for path in (ROOT / "src/luthier").glob("*/__init__.py")
    }
    assert there - {"__init__"} <= named


def test_an_upward_import_is_found(tmp_path: Path) -> None:
    package = tmp_path / "src/luthier"
    for source in (ROOT / "src/luthier").rglob("*.py"):
        target = package / source.relative_to(ROOT / "src/luthier")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(
        (ROOT / "pyproject.toml").read_text(encoding="utf-8"), encoding="utf-8"
    )
    types = package / "types.py"
    types.write_text(types.read_text(encoding="utf-8") + "\nimport luthier.stages.sft\n", encoding="utf-8")
    result = lint(tmp_path)
    assert result.returncode == 1
    assert "luthier.types is not allowed to import luthier.stages" in result.stdout
