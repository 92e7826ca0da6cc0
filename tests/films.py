"""Tests of films, in a process of their own that has torchvision."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(sys.prefix) / "torchvision"
"""Where `make env` puts torchvision, apart: what a registry has of it does not fit a CPU's torch as it is."""


def with_torchvision(test: str, folder: Path) -> None:
    """Run the same test in a process that has torchvision; `folder` is for its files."""
    if not (FOLDER / "torchvision").is_dir():
        pytest.skip("films need torchvision; `make env` puts it beside the environment")
    root = Path(__file__).parents[1]
    path = os.pathsep.join(filter(None, (str(FOLDER), str(root), os.environ.get("PYTHONPATH"))))
    told = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "tests.torchvision_operators", test]
    done = subprocess.run(
        [*told, "--basetemp", str(folder / "inner")],
        cwd=root,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-3000:]
