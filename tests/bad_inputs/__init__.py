"""Inputs that must be refused, as tables: what is in the folder, what is typed, what is said.

Every module of this package is one category and has a list `CASES`; `tests/e2e/test_bad_inputs.py` runs them all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BadInput:
    """One command that must fail and change nothing."""

    name: str
    files: Mapping[str, str | bytes]
    """What is in the working directory, by relative path; a path that ends in / is an empty folder."""
    words: Sequence[str]
    """What stands behind `luthier` on the command line."""
    message: str
    """All of stderr, {dir} standing for the working directory."""
    status: int = 2
