"""The page of LLaMA-Factory's keys is what the code says of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from luthier.recipe.earlier_keys import OLDER_NAMES
from luthier.recipe.key_table import markdown
from luthier.recipe.known_keys import KEYS

PAGE = Path(__file__).parents[2] / "docs" / "llamafactory_keys.md"


def test_the_page_is_what_the_code_writes() -> None:
    assert PAGE.read_text(encoding="utf-8") == markdown(), "make docs writes docs/llamafactory_keys.md anew"


def test_the_page_has_a_row_for_every_key() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted([*KEYS, *OLDER_NAMES])


def test_every_row_has_three_cells() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {4}


def test_the_command_of_the_makefile_prints_the_page() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "luthier.recipe.key_table"], capture_output=True, text=True, check=True
    )
    assert done.stdout == markdown()
