"""Imported before all else: gives this process a `datasets` cache of its own, which no other call has filled."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

_JOB = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
FOLDER = Path(_JOB["output"]) / "datasets"
os.environ["HF_DATASETS_CACHE"] = str(FOLDER)  # `datasets` reads it once, when it is imported


def check() -> None:
    """Raise RuntimeError where `datasets` was imported before this module."""
    import datasets

    if Path(datasets.config.HF_DATASETS_CACHE) != FOLDER:
        raise RuntimeError("datasets was imported before its cache was chosen")
