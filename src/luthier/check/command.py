"""The command `luthier check`: the findings on the terminal, as JSON, or as a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from luthier.check.check import check
from luthier.check.page import page
from luthier.check.text import report
from luthier.types import RecipeError


def run(
    recipe: Path,
    overrides: Sequence[str],
    *,
    samples: int,
    everything: bool,
    probe: bool,
    as_json: bool,
    html: Path | None,
) -> bool:
    """Check and show; returns whether `train` would begin. Progress and what libraries say go to stderr.

    Raises RecipeError where the page cannot be written; before the work, where its folder is not there.
    """
    if html is not None and (html.is_dir() or not html.absolute().parent.is_dir()):
        raise RecipeError(f"--html {html}: not a file in a folder that exists")
    aside = Console(stderr=True, soft_wrap=True, emoji=False)
    found = check(
        recipe,
        overrides,
        say=lambda text: aside.print(text, style="dim", highlight=False, markup=False),
        samples=samples,
        everything=everything,
        probe=probe,
    )
    if html is not None:
        try:
            html.write_text(page(found, recipe.name), encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"--html {html}: {error.strerror or error}") from error
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        Console(soft_wrap=True, emoji=False).print(report(found), highlight=False)
    return found.ok
