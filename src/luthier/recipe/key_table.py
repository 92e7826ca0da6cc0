"""The page docs/llamafactory_keys.md, written from the tables that the translation itself reads.

`python -m luthier.recipe.key_table` prints it; `make docs` writes it.
"""

from __future__ import annotations

from collections.abc import Iterator

from luthier.recipe.earlier_keys import OLDER_NAMES
from luthier.recipe.key_rules import Key, Rule
from luthier.recipe.known_keys import GROUPS, KEYS
from luthier.recipe.source import dump_value

_INTRODUCTION = """\
# LLaMA-Factory's keys

A LLaMA-Factory file trains here as it is, and `luthier migrate FILE` prints it as a native recipe. This page lists
every key of version 0.9.5 and of the transformers that it takes its training arguments from, those of their other
versions, and what becomes of each when it says something else than its default there. A key that is not on this page is
an error that names the nearest one.

* A native key (`optim.lr`): the value goes there; what a file leaves out takes the default of this page.
* *note*: accepted, and the run says what is done instead.
* *refused*: an error that says what to do.
* *silent*: accepted; it cannot change what is trained here.

`make docs` writes this page from the code.
"""


def markdown() -> str:
    """The whole page."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield _INTRODUCTION
    for title, group in GROUPS.items():
        yield f"## {title}\n"
        yield "| key | default there | here |"
        yield "|---|---|---|"
        for name, key in sorted(group.items()):
            yield f"| `{name}` | `{_cell(dump_value(key.default))}` | {_cell(_outcome(name, key))} |"
        yield ""
    yield "## Other names\n"
    yield "| name | means | here |"
    yield "|---|---|---|"
    for older, name in sorted(OLDER_NAMES.items()):
        yield f"| `{older}` | `{name}` | {_cell(_outcome(name, KEYS[name]))} |"


def _outcome(name: str, key: Key) -> str:
    remark = f" ({key.text})" if key.text else ""
    match key.rule:
        case Rule.READ | Rule.DIRECT:
            return f"`{key.target}`{remark}"
        case Rule.EXTRA:
            return f"`train.extra.{name}`"
        case Rule.SILENT:
            return "*silent*"
        case Rule.NOTED:
            return f"*note*: {key.text}"
        case Rule.REFUSED:
            where = f" (with `{key.only_with}`)" if key.only_with else ""
            return f"*refused*{where}: {key.text}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(markdown(), end="")
