"""What the pages on methods, optimizers and quantization write is what the recipe takes, and none is left out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from luthier.recipe import schema
from tests.contract.test_tables import kinds

ROOT = Path(__file__).parents[2]
PAGES = ("methods", "optimizers", "quantization")
INLINE = re.compile(r"`(?:(method|optim|model\.quantization): )?(\{type: [^`]*\})`")
SECTIONS: dict[str, Any] = {
    "method": schema.MethodSpec,
    "optim": schema.AnyOptimSpec,
    "model.quantization": schema.QuantizationSpec,
    "methods": schema.MethodSpec,
    "optimizers": schema.AnyOptimSpec,
    "quantization": schema.QuantizationSpec,
}


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def fragments() -> list[tuple[str, str]]:
    """Each `{type: ...}` in a sentence or a table, with the part of the recipe that it stands for."""
    found = [(match[1] or name, match[2]) for name in PAGES for match in INLINE.finditer(page(name))]
    return [(section, text) for section, text in found if "..." not in text]


def documented(name: str) -> set[str]:
    """The types that stand in the first column of a page's tables."""
    return {match[1] for match in re.finditer(r"^\| `(\w+)`", page(name), re.MULTILINE)}


def one_of_each(text: str) -> list[dict[str, Any]]:
    """A fragment may give several values of its `bits`: the first in the mapping, the others behind commas."""
    several = re.search(r"bits: (\d+(?:, \d+)+)", text)
    if several is None:
        return [yaml.safe_load(text)]
    return [yaml.safe_load(text.replace(several[1], bits)) for bits in several[1].split(", ")]


@pytest.mark.parametrize(("section", "text"), fragments())
def test_fragments_validate(section: str, text: str) -> None:
    for tree in one_of_each(text):
        TypeAdapter(SECTIONS[section]).validate_python(tree)


def test_there_are_fragments() -> None:
    assert {section for section, _ in fragments()} >= {"method", "quantization"}


def test_every_method_has_its_row() -> None:
    assert documented("methods") == kinds(schema.MethodSpec)


def test_every_optimizer_has_its_row_and_its_bytes() -> None:
    types = kinds(schema.AnyOptimSpec)
    assert documented("optimizers") == types
    results = json.loads((ROOT / "benchmarks" / "results" / "optimizers.json").read_text(encoding="utf-8"))
    rows = results["optimizers"]
    assert {re.split(r"[ ,]", name)[0] for name in rows} == types
    assert not results["not_installed"]
    for name, row in rows.items():
        assert row["state"] == row["foretold"], name
        assert row["state_share_of_adamw"] == round(row["state"] / rows["adamw"]["state"], 4)
