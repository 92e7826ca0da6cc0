"""What the metrics of texts need, and the line that installs it; asked without importing any of it."""

from __future__ import annotations

from importlib import util

from luthier.types import RecipeError

INSTALL = "pip install 'luthier[metrics]'"
LIBRARIES = {
    "jieba": "jieba",
    "nltk": "nltk",
    "rouge_chinese": "rouge-chinese",
    "sacrebleu": "sacrebleu",
}
"""Packages by the module that is imported."""


def require_libraries(key: str) -> None:
    """Raise RecipeError, with the line that installs them, where a library of the metrics is missing."""
    missing = [package for module, package in LIBRARIES.items() if util.find_spec(module) is None]
    if missing:
        raise RecipeError(f"{key} needs {', '.join(missing)}, not installed here: {INSTALL}")
