"""Luthier fine-tunes language models, and proves every step on your own machine.

    import luthier
    run = luthier.train("recipe.yaml")

Importing this package imports no torch; `train` does, when it is called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.run import TrainResult

__version__ = "0.1.0"
__all__ = ["__version__", "train"]


def train(
    recipe: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), *, quiet: bool = False
) -> TrainResult:
    """Train what the recipe describes.

    recipe: path of a native or LLaMA-Factory YAML/JSON file, or the same as a mapping.
    overrides: `["train.epochs=2"]`, as on the command line.
    Raises a `luthier.types.LuthierError` whose message says what to mend.
    """
    from luthier.run import train as run_train

    return run_train(recipe, overrides, quiet=quiet)
