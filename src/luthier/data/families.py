"""Named chat templates: the table `templates.yaml` in `luthier/families`, and the Jinja files beside it.

A name's entry says where its text comes from: `jinja` names a file (several names may share one; the name's own
file where nothing is said), or is `tokenizer` for the tokenizer's own template; `turns` gives the strings of
`data.turns`. The other keys are the fields of `Family`.

A Jinja file may hold `{{- cut -}}` where LLaMA-Factory tokenizes the pieces of a turn separately. Those marks
are used only when a translated recipe has to give the same tokens as that tool; they are not part of the
template that is installed, shown or saved.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from luthier.data import tool_formats
from luthier.data.turns import CUT, Turns, quoted
from luthier.recipe.schema import TemplateSpec
from luthier.types import DataError

__all__ = ["CUT", "FOUR_STRINGS", "Family", "find", "from_strings", "names"]

FOUR_STRINGS = "four strings"
"""What messages call a template that the recipe writes out."""


@dataclass(frozen=True, slots=True)
class Family:
    """A named template; `marked_source` is None where it is the tokenizer's own.

    `eos` ends an answer where it is not the tokenizer's own end token; `stop` are further tokens at which
    generation stops; `document_end` ends a document of pre-training text, where it is not the tokenizer's end
    token. A conversation without a system message has `default_system`. `thinking` is what opens and closes
    reasoning, `tools` names the way in which tools and calls are written, `media` gives the placeholder of each
    kind of medium. `verified` are the published templates that it is compared with; without one it is called
    unverified. `differs` says where the text is not LLaMA-Factory's, or may not be the publisher's, and why.
    """

    name: str
    marked_source: str | None
    about: str = ""
    eos: str | None = None
    stop: tuple[str, ...] = ()
    document_end: str | None = None
    default_system: str | None = None
    thinking: tuple[str, str] | None = None
    tools: str | None = None
    media: Mapping[str, str] = field(default_factory=dict)
    verified: tuple[str, ...] = ()
    differs: str = ""
    layout: str = ""
    """The text with the marks of `tool_formats`, for a tool format other than the family's own."""

    @property
    def source(self) -> str | None:
        """The Jinja template itself, without `default_system`."""
        return None if self.marked_source is None else self.marked_source.replace(CUT, "")


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
        try:
            text = path.read_text(encoding="utf-8")
            return Family(path.stem, tool_formats.without_tools(text), str(path), layout=text)
        except UnicodeDecodeError as error:
            raise DataError(f"data.template: {path} is not UTF-8 text (byte {error.start})") from error
    near = difflib.get_close_matches(name, table, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "`luthier templates` lists them."
    raise DataError(
        f"data.template: no template {name!r}; {hint} A path that ends in .jinja is read as a file; "
        "without data.template the tokenizer's own chat template is used"
    )


def from_strings(spec: TemplateSpec, *, begin: bool) -> Family:
    """The template that prefix, prompt, separator and history rule describe; `begin`: after the begin token.

    This is the form of the first versions of LLaMA-Factory: a prefix (or the system message in its place) and a
    separator; then for each turn the prompt, the answer and the end token, with a separator between turns.
    Such a template has no role but system, user and assistant, and an answer follows a question.
    """
    head, tail = spec.prompt.split("{query}")
    lines = [
        f"{{{{- bos_token -}}}}{CUT}" if begin else "",
        f"{{%- set ns = namespace(prefix={quoted(spec.prefix)}, asked=false) -%}}",
        "{%- if messages and messages[0]['role'] == 'system' -%}",
        "{%- set ns.prefix = messages[0]['content'] -%}",
        "{%- endif -%}",
        "" if spec.use_history else _ONE_TURN,
        f"{{%- if ns.prefix -%}}{{{{- ns.prefix + {quoted(spec.separator)} -}}}}{{%- endif -%}}",
        "{%- for message in messages -%}",
        "{%- if message['role'] == 'user' and not ns.asked -%}",
        f"{{{{- {quoted(head)} + message['content'] + {quoted(tail)} -}}}}",
        "{%- set ns.asked = true -%}",
        "{%- elif message['role'] == 'assistant' and ns.asked -%}",
        f"{{{{- message['content'] -}}}}{CUT}{{{{- eos_token -}}}}{CUT}",
        f"{{%- if not loop.last -%}}{{{{- {quoted(spec.separator)} -}}}}{{%- endif -%}}",
        "{%- set ns.asked = false -%}",
        "{%- elif message['role'] != 'system' or not loop.first -%}",
        "{{- raise_exception('this template has no place here for role ' + message['role']) -}}",
        "{%- endif -%}",
        "{%- endfor -%}",
    ]
    return Family(FOUR_STRINGS, "\n".join(line for line in lines if line), "prefix, prompt and separator")


_ONE_TURN = (
    "{%- if messages | selectattr('role', 'equalto', 'user') | list | length > 1 -%}"
    "{{- raise_exception('this template shows one turn only: use_history is false') -}}{%- endif -%}"
)


_LISTS = ("stop", "verified", "thinking")
_OWN = "tokenizer"


def with_tool_format(family: Family | None, name: str) -> Family:
    """The family with this tool format in place of its own. Raises DataError where its layout has no place for one."""
    if family is None or not tool_formats.has_place(family.layout):
        which = "the tokenizer's own chat template" if family is None else f"template {family.name!r}"
        raise DataError(
            f"data.tool_format={name!r}: {which} has no place for a tool format: it writes tools in its own way, "
            "or not at all. Remove data.tool_format, or name a template that takes one: "
            + ", ".join(_that_take_one())
        )
    return replace(family, marked_source=tool_formats.with_tools(family.layout, name))


def _that_take_one() -> list[str]:
    return [name for name, family in sorted(_table().items()) if tool_formats.has_place(family.layout)]


def _with_its_tools(layout: str, name: str | None) -> str:
    if name is None or not tool_formats.has_place(layout):
        return tool_formats.without_tools(layout)
    return tool_formats.with_tools(layout, name)


@cache
def _table() -> dict[str, Family]:
    folder = resources.files("luthier") / "families"
    table = yaml.safe_load((folder / "templates.yaml").read_text(encoding="utf-8"))
    return {name: _family(folder, name, entry) for name, entry in table.items()}


def _family(folder: Traversable, name: str, entry: Mapping[str, Any]) -> Family:
    rest: dict[str, Any] = {key: tuple(value) if key in _LISTS else value for key, value in entry.items()}
    jinja, turns = rest.pop("jinja", name), rest.pop("turns", None)
    if jinja == _OWN:
        return Family(name, None, **rest)
    if turns is not None:
        layout = Turns(**turns).jinja
    else:
        layout = (folder / f"{jinja}.jinja").read_text(encoding="utf-8").rstrip("\n")
    return Family(name, _with_its_tools(layout, entry.get("tools")), layout=layout, **rest)
