"""The examples of sweeps: they validate, all of their trials do, and editors know their keys."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from luthier.cli import app

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "sweep"
EXAMPLES = sorted(FOLDER.glob("*.yaml"))
HEAVY = ("torch", "transformers", "peft", "datasets", "matplotlib")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_trial_of_an_example_is_accepted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(app, ["sweep", "--dry-run", str(path)])
    assert result.exit_code == 0, result.stderr
    found = re.match(r"(\d+) trials into (\S+), ", result.stdout)
    assert found is not None and int(found[1]) > 1
    assert found[2].startswith("sweeps/")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_commands_in_an_example_parse_and_name_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = re.findall(r"^#.*?luthier (sweep .+)$", text, re.MULTILINE)
    assert lines
    command = get_command(app).commands["sweep"]  # type: ignore[attr-defined]
    for line in lines:
        words = line.split()[1:]
        context = command.make_context("sweep", words)
        assert (ROOT / context.params["file"]) == path


def test_the_examples_are_found() -> None:
    assert {path.stem for path in EXAMPLES} >= {"learning_rate", "estimator"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_editors_are_pointed_to_the_schema(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=sweep.schema.json\n")


def test_the_schema_file_is_what_the_command_prints() -> None:
    printed = CliRunner().invoke(app, ["schema", "--sweep"])
    assert printed.exit_code == 0
    assert json.loads(printed.stdout) == json.loads(
        (FOLDER / "sweep.schema.json").read_text(encoding="utf-8")
    ), "make schema writes examples/sweep/sweep.schema.json anew"


def test_looking_at_a_sweep_imports_nothing_heavy() -> None:
    """The sweep's own process stays small beside its trials, too: it is the same code."""
    program = (
        "import sys\nfrom luthier.cli import app\n"
        f"try:\n    app(['sweep', '--dry-run', {str(EXAMPLES[-1])!r}])\n"
        "except SystemExit as end:\n    assert not end.code\n"
        f"print('IMPORTED', *[name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.splitlines()[-1] == "IMPORTED"
