"""Tool formats: how tools, calls and results are written, put into a family's layout as one chat template.

    names()                     the formats of `luthier/families/tools`
    about(name)                 what one is, and where it differs from others' text
    with_tools(layout, name)    the layout with that format: Jinja that needs no other file
    without_tools(layout)       the layout without its marks
    has_place(layout)           whether a layout can take a format

A layout is a Jinja template with `PLACE` in it. There the format rewrites `messages`, so that what follows sees
plain turns: the tools in the system turn's content, calls in an answer's (`calls_alone` says that it had no other),
results in those of role `tool`. So the mark stands after the layout has put its own default system turn into
`messages`, and the layout has a turn for role `tool`. Where the vendor shows tools outside the system turn,
`APART` says where, and the system turn has none of a format that is written so.
"""

from __future__ import annotations

import difflib
import json
from functools import cache
from importlib import resources
from typing import Any

import yaml

from luthier.types import DataError

PLACE = "{#- place of a tool format -#}"
APART = "{#- place of its text apart -#}"


def names() -> list[str]:
    """Names of the formats."""
    return sorted(_formats())


def about(name: str) -> tuple[str, str]:
    """What a format is, and from whose text it differs and why ("" where from none). Raises DataError for no format."""
    entry = _format(name)
    return entry["about"], entry.get("differs", "")


def has_place(layout: str) -> bool:
    """Whether a layout can take a tool format."""
    return PLACE in layout


def without_tools(layout: str) -> str:
    """The layout as a template that shows no tools."""
    return layout.replace(PLACE, "").replace(APART, "")


def with_tools(layout: str, name: str) -> str:
    """One self-contained template. Raises DataError for an unknown format and a layout without a place for one."""
    entry = _format(name)
    if not has_place(layout):
        raise DataError(
            f"tool format {name!r}: the template has no place for one; a layout marks it with {PLACE}"
        )
    apart = entry.get("place") == "apart" and APART in layout
    text = "{%- if tools -%}{{- tool_system('', tools) -}}{%- endif -%}" if apart else ""
    parts = [_text(name), _results(entry, layout), _text("_messages"), "" if apart else _text("_system")]
    return layout.replace(PLACE, "\n".join(part for part in parts if part)).replace(APART, text)


def _results(entry: dict[str, Any], layout: str) -> str:
    """What stands around results and between those of one turn, as Jinja variables."""
    result = entry.get("result", {})
    opens, closes, join = result.get("opens", ""), result.get("closes", ""), entry.get("join")
    if opens and opens.strip() in layout:
        # the layout writes the marks of a turn itself
        join = None if join is None else closes + join + opens
        opens = closes = ""
    values = {"result_opens": opens, "result_closes": closes, "result_join": join}
    return "\n".join(
        f"{{%- set {key} = {'none' if value is None else json.dumps(value, ensure_ascii=False)} -%}}"
        for key, value in values.items()
    )


def _format(name: str) -> dict[str, Any]:
    formats = _formats()
    if name not in formats:
        near = difflib.get_close_matches(name, formats, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(sorted(formats))}"
        raise DataError(f"data.tool_format: there is no tool format {name!r}; {hint}")
    return formats[name]


@cache
def _formats() -> dict[str, dict[str, Any]]:
    text = (resources.files("luthier") / "families" / "tools" / "formats.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


@cache
def _text(name: str) -> str:
    file = resources.files("luthier") / "families" / "tools" / f"{name}.jinja"
    return file.read_text(encoding="utf-8").rstrip("\n")
