"""`luthier prepare` by two processes at once, and by one that is killed: an entry is whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from luthier.cli import app
from luthier.data.cache import TokenCache
from tests.tiny import chat_model, write_alpaca

ROOT = Path(__file__).parents[2]

# Each process encodes all rows, says that its entry is ready to be published, and waits for the other one.
AT_THE_SAME_MOMENT = """
import os, sys, time
from pathlib import Path
from luthier.cli import app
from luthier.data.cache import TokenCache

meeting, publish = Path(sys.argv.pop(1)), TokenCache._publish

def together(self, unfinished, entry, dataset):
    (meeting / str(os.getpid())).touch()
    until = time.monotonic() + 120
    while len(list(meeting.iterdir())) < 2 and time.monotonic() < until:
        time.sleep(0.001)
    publish(self, unfinished, entry, dataset)

TokenCache._publish = together
app()
"""

KILLED = """
import os, signal
from luthier.cli import app
from luthier.stages import sft

encode = sft.sft_sample

def dies(row, template, options):
    if row.index == 1500:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(row, template, options)

sft.sft_sample = dies
app()
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    chat_model(tmp_path / "model")
    write_alpaca(tmp_path / "rows.json", 2000)  # more than one batch of the Arrow file
    tree = {
        "model": {"path": str(tmp_path / "model")},
        "data": {"train": ["rows.json"], "directory": str(tmp_path), "cache": str(tmp_path / "cache")},
        "train": {"output": str(tmp_path / "run")},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(tree))
    return tmp_path / "recipe.yaml"


def start(code: str, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
    )


def prepare(recipe: Path, *words: str) -> str:
    """What the command says last, with the first digits of the key, from an ordinary run in this process."""
    result = CliRunner().invoke(app, ["prepare", str(recipe), *words])
    assert result.exit_code == 0, result.output
    return str(result.stdout).splitlines()[-1]


def content(folder: Path) -> dict[str, str]:
    """Every file under a folder, hashed."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_two_processes_that_prepare_at_once(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "meeting").mkdir()
    both = [start(AT_THE_SAME_MOMENT, str(tmp_path / "meeting"), "prepare", str(recipe)) for _ in range(2)]
    outputs = []
    for process in both:
        output, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        outputs.append(output.splitlines()[-1])
    assert len(list((tmp_path / "meeting").iterdir())) == 2  # neither found the other's entry ready
    alone = prepare(recipe, f"data.cache={tmp_path / 'alone'}")
    assert outputs == [alone, alone] and alone.startswith("rows: ready (")
    (entry,) = (tmp_path / "cache").iterdir()
    assert f"({entry.name[:16]})" in alone
    assert content(tmp_path / "cache") == content(tmp_path / "alone")
    found = TokenCache(tmp_path / "cache").get(entry.name, "rows")
    assert found is not None
    table, report = found
    assert len(table) == report.rows == report.samples == 2000 and report.dropped == {}
    assert sum(len(sample) for sample in table) == report.tokens
    assert not (tmp_path / "run").exists()


def test_a_killed_process_leaves_nothing_that_is_read(recipe: Path, tmp_path: Path) -> None:
    process = start(KILLED, "prepare", str(recipe))
    process.communicate(timeout=240)
    assert process.returncode == -signal.SIGKILL
    (left,) = (tmp_path / "cache").iterdir()
    assert left.name.startswith(".") and {path.name for path in left.iterdir()} == {"tokens.arrow", "work"}
    assert (left / "tokens.arrow").stat().st_size > 0  # half of the rows were there already
    again = prepare(recipe)
    alone = prepare(recipe, f"data.cache={tmp_path / 'alone'}")
    assert again == alone
    (entry,) = (path for path in (tmp_path / "cache").iterdir() if not path.name.startswith("."))
    assert content(entry) == content(tmp_path / "alone" / entry.name)
