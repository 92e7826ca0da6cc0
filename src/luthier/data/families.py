"""Named chat templates: the Jinja files and the table in `luthier/families`.

A Jinja file may hold `{{- cut -}}` where LLaMA-Factory tokenizes the pieces of a turn separately. Those marks
are used only when a translated recipe has to give the same tokens as that tool; they are not part of the
template that is installed, shown or saved.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

import yaml

from luthier.types import DataError

CUT = "{{- cut -}}"


@dataclass(frozen=True, slots=True)
class Family:
    """A named template.

    `eos` ends an answer where it is not the tokenizer's own end token; `stop` are further tokens at which
    generation stops; `document_end` ends a document of pre-training text, where it is not the tokenizer's end
    token.
    """

    name: str
    marked_source: str
    about: str = ""
    eos: str | None = None
    stop: tuple[str, ...] = ()
    document_end: str | None = None

    @property
    def source(self) -> str:
        """The Jinja template itself."""
        return self.marked_source.replace(CUT, "")


def names() -> list[str]:
    """Names of the templates that come with the package."""
    return sorted(_table())


def find(name: str) -> Family:
    """The named template, or the user's own .jinja file. Raises DataError for neither."""
    table = _table()
    if name in table:
        return table[name]
    if name.endswith((".jinja", ".jinja2")):
        path = Path(name)
        if not path.is_file():
            raise DataError(f"data.template: file {path} does not exist")
        return Family(name=path.stem, marked_source=path.read_text(encoding="utf-8"), about=str(path))
    near = difflib.get_close_matches(name, table, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"choose from {', '.join(sorted(table))}"
    raise DataError(
        f"data.template: no template {name!r}; {hint} A path that ends in .jinja is read as a file; "
        "without data.template the tokenizer's own chat template is used"
    )


@cache
def _table() -> dict[str, Family]:
    folder = resources.files("luthier") / "families"
    table = yaml.safe_load((folder / "templates.yaml").read_text(encoding="utf-8"))
    return {
        name: Family(
            name=name,
            marked_source=(folder / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n"),
            about=entry.get("about", ""),
            eos=entry.get("eos"),
            stop=tuple(entry.get("stop", ())),
            document_end=entry.get("document_end"),
        )
        for name, entry in table.items()
    }
