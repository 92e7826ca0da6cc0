"""The schema that the command prints and the file that editors read say the same."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from luthier.cli import app

SCHEMA_FILE = Path(__file__).parents[2] / "examples" / "recipe.schema.json"


def test_every_key_is_described() -> None:
    """What an editor shows beside a key; a name that says it all may stand alone."""
    definitions = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))["$defs"]
    for key in ("max_length", "overflow", "max_lost", "dev_split"):
        assert definitions["DataSpec"]["properties"][key]["description"]
    for key in ("output", "tokens_per_batch", "resume"):
        assert definitions["TrainSpec"]["properties"][key]["description"]


def test_the_schema_file_is_what_the_command_prints() -> None:
    printed = CliRunner().invoke(app, ["schema"])
    assert printed.exit_code == 0
    assert json.loads(printed.stdout) == json.loads(SCHEMA_FILE.read_text(encoding="utf-8")), (
        "make schema writes examples/recipe.schema.json anew"
    )
