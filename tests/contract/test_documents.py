"""Every example loads, and every command and recipe that the documents show is one that exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from luthier.cli import app
from luthier.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
COMMANDS = set(get_command(app).commands)  # type: ignore[attr-defined]


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 5
    assert len(DOCUMENTS) >= 6


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_example_is_a_recipe(file: Path) -> None:
    loaded = load_recipe(file)
    assert loaded.recipe.data.train
    theirs = "model_name_or_path" in yaml.safe_load(file.read_text())
    assert loaded.llamafactory == theirs
    if not theirs:
        assert file.read_text().startswith("# yaml-language-server: $schema=")


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_commands_of_a_document_exist(file: Path) -> None:
    blocks = re.findall(r"^```(?:bash|sh|console)?\n(.*?)^```", file.read_text(encoding="utf-8"), re.M | re.S)
    for block in blocks:
        for word in re.findall(r"^\s*\$?\s*luthier (\S+)", block, re.M):
            assert word in COMMANDS or word in ("--help", "--version"), f"luthier {word}"
        for target in re.findall(r"^\s*\$?\s*make ([a-z]+)", block, re.M):
            assert f"\n{target}:" in (ROOT / "Makefile").read_text(), f"make {target}"


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_native_recipes_of_a_document_load(file: Path) -> None:
    for block in re.findall(r"^```yaml\n(.*?)^```", file.read_text(encoding="utf-8"), re.M | re.S):
        tree = yaml.safe_load(block)
        if isinstance(tree, dict) and ("model" in tree or "model_name_or_path" in tree):
            load_recipe(tree)
