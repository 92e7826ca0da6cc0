"""The command line parses, explains and validates without torch: importing it costs seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "pyarrow", "matplotlib")
EXAMPLE = Path(__file__).parents[2] / "examples" / "sft_lora.yaml"


def heavy_modules_after(code: str) -> set[str]:
    """Run `code` in a fresh interpreter; the heavy packages that it has imported."""
    program = f"import sys\n{code}\nprint('IMPORTED', *sorted(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize(
    "code",
    [
        "import luthier",
        "import luthier.types",
        "import luthier.cli",
        "import luthier.recipe.schema, luthier.recipe.load, luthier.recipe.resolve, luthier.recipe.llamafactory",
        f"from luthier.recipe.load import load_recipe; load_recipe({str(EXAMPLE)!r}, ['train.epochs=2'])",
    ],
    ids=["package", "types", "cli", "recipe", "validation"],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    assert heavy_modules_after(code) == set()


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["schema"], ["migrate", "FILE"]], ids=" ".join
)
def test_commands_that_only_read_import_nothing_heavy(arguments: list[str]) -> None:
    file = str(EXAMPLE.with_name("llamafactory_sft_lora.yaml"))
    words = [file if word == "FILE" else word for word in arguments]
    code = f"from luthier.cli import app\ntry:\n    app({words!r})\nexcept SystemExit as end:\n    assert not end.code"
    assert heavy_modules_after(code) == set()


def test_the_probe_sees_a_heavy_import() -> None:
    assert heavy_modules_after("import pyarrow") == {"pyarrow"}
