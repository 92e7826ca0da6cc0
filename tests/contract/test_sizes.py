"""A file holds one idea, a function does one thing, and a module is named after what it holds."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "luthier"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_FILE = 400
MAX_FUNCTION = 60
NO_NAMES = {"utils", "util", "misc", "common", "extras", "helpers"}


def name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def num_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def test_the_package_is_found() -> None:
    assert {"cli/app.py", "types.py", "stages/sft.py"} <= {name(path) for path in MODULES}


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_file_and_function_sizes(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE, (
        f"{name(path)} has {lines} lines: it holds two ideas, find the second one's name"
    )
    long = {node.name: num_lines(node) for node in functions(path) if num_lines(node) > MAX_FUNCTION}
    assert not long, f"{name(path)}: longer than {MAX_FUNCTION} lines"


def test_names_say_what_is_inside() -> None:
    stems = {part for path in MODULES for part in (*path.relative_to(PACKAGE).parent.parts, path.stem)}
    assert not stems & NO_NAMES
    classes = [
        node.name
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    ]
    assert not [found for found in classes if found.lstrip("_").startswith("Custom")]


def test_no_unfinished_work() -> None:
    marks = ("TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error")
    found = [
        f"{name(path)}:{number}: {mark}"
        for path in MODULES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        for mark in marks
        if mark in line
    ]
    assert not found
