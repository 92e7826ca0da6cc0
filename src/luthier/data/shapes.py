"""Layouts of conversations that differ in their words alone, from one rendering for all of them.

A template is rendered once for each sequence of roles, with contents that notice what is done with them. One that only
puts them between its own words writes any others in the same places: the layout of the next conversation with these
roles is put together from the first. What a template asks of a content (whether it is empty, or holds a mark) is kept
as a condition; where it does anything else (cuts, counts, compares), its conversations are rendered one by one.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes

from luthier.data.rendering import Answer, ChatMessage, Layout, Renderer
from luthier.types import DataError

LayOut = Callable[[Renderer, Sequence[ChatMessage], Sequence[Any]], Layout]

_MOST = 512
"""Sequences of roles that are remembered."""
_OPENING, _CLOSING = chr(0xF0003), chr(0xF0004)
_CAPTURING = (nodes.AssignBlock, nodes.FilterBlock, nodes.Concat)
"""What turns contents into plain text, which would be looked at unnoticed."""
_BLIND = {"join", "format", "xmlattr", "urlize", "pprint"}
"""Filters that read a text without its methods; so does `tojson`, which is watched."""


class _LookedInto(Exception):
    """A template did more with a content than to write it."""


@dataclass(slots=True)
class _Conditions:
    """What has to hold of contents so that the template does the same with them."""

    stripped: bool = False
    given: bool = False
    without: set[str] = field(default_factory=set)

    def hold(self, content: str) -> bool:
        return (
            (not self.given or content != "")
            and (not self.stripped or content == content.strip())
            and not any(map(content.__contains__, self.without))
        )


class _Content(str):
    """A text that notices what is done with it."""

    conditions: _Conditions

    @classmethod
    def of(cls, text: str, conditions: _Conditions) -> _Content:
        made = cls(text)
        made.conditions = conditions
        return made

    def _with(self, text: str) -> _Content:
        return _Content.of(text, self.conditions)

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> _Content:
        return self._with(str.__add__(self, other))

    def __radd__(self, other: str) -> _Content:
        return self._with(str.__add__(other, str.__str__(self)))

    def __bool__(self) -> bool:
        self.conditions.given = True
        return True

    def __contains__(self, mark: object) -> bool:
        if not isinstance(mark, str) or isinstance(mark, _Content) or not mark:
            raise _LookedInto
        if str.__contains__(self, mark):  # in what the template has put around it
            raise _LookedInto
        self.conditions.without.add(mark)
        return False

    def __eq__(self, other: object) -> bool:
        if other is None:
            return False
        raise _LookedInto

    def __ne__(self, other: object) -> bool:
        return not self.__eq__(other)

    __hash__ = None  # type: ignore[assignment]

    def strip(self, chars: str | None = None, /) -> _Content:
        if chars is not None or str.strip(self) != str.__str__(self):
            raise _LookedInto
        self.conditions.stripped = self.conditions.given = True
        return self

    lstrip = rstrip = strip


def _noticed(*_: Any, **__: Any) -> NoReturn:
    raise _LookedInto


_KEPT = {*vars(_Content), *dir(object)} - {"__eq__", "__ne__", "__hash__", "__format__", "__sizeof__"}
for _name in set(dir(str)) - _KEPT | {"__format__", "__lt__", "__le__", "__gt__", "__ge__"}:
    setattr(_Content, _name, _noticed)


@dataclass(frozen=True, slots=True)
class _Place:
    """A position in a text: so many characters after the start of literal `part`."""

    part: int
    after: int

    def at(self, starts: Sequence[int]) -> int:
        return starts[self.part] + self.after


@dataclass(frozen=True, slots=True)
class _Shape:
    """literals[0], contents[order[0]], literals[1], ...: the text; places in it, and conditions of contents."""

    literals: tuple[str, ...]
    order: tuple[int, ...]
    cuts: tuple[_Place, ...]
    answers: tuple[tuple[int, _Place, _Place, _Place], ...]
    conditions: _Conditions

    def layout(self, contents: Sequence[str]) -> Layout:
        parts = [self.literals[0]]
        for number, literal in zip(self.order, self.literals[1:], strict=True):
            parts += (contents[number], literal)
        starts = [0, *accumulate(map(len, parts))][::2]
        return Layout(
            "".join(parts),
            tuple(place.at(starts) for place in self.cuts),
            tuple(Answer(k, a.at(starts), b.at(starts), c.at(starts)) for k, a, b, c in self.answers),
        )


def _watched(renderer: Renderer) -> Renderer | None:
    """The same renderer with a template that notices what it does with contents; None where that is not to be had.

    Its macros raise: what calls one writes more than plain turns. It may not write anything else on another day.
    """
    copied = copy(renderer)
    environment = copied.compile_anew().environment
    tree = environment.parse(renderer.source)
    macros = list(tree.find_all(nodes.Macro))
    inside = {id(node) for macro in macros for node in macro.find_all((*_CAPTURING, nodes.Filter))}
    outside = [node for node in tree.find_all((*_CAPTURING, nodes.Filter)) if id(node) not in inside]
    blind = [node for node in outside if not isinstance(node, nodes.Filter) or node.name in _BLIND]
    if blind or "strftime_now" in renderer.source:
        return None
    for macro in macros:
        raised = nodes.Call(nodes.Name("raise_exception", "load"), [nodes.Const("a macro")], [], None, None)
        macro.body = [nodes.Output([raised]).set_environment(environment)]
    to_json = environment.filters["tojson"]

    def noticing(value: Any, *args: Any, **named: Any) -> Any:
        if _holds_content(value):
            raise _LookedInto
        return to_json(value, *args, **named)

    environment.filters["tojson"] = noticing
    code: Any = environment.compile(tree)
    copied.use(environment.template_class.from_code(environment, code, environment.make_globals(None)))
    return copied


def _holds_content(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_content, value.values()))
    return isinstance(value, _Content) or (
        isinstance(value, list | tuple) and any(map(_holds_content, value))
    )


def _is_text(content: Any) -> bool:
    return isinstance(content, str)


class Shapes:
    """Layouts by roles. `lay_out` makes the layout of messages by rendering them, and looks for `end_texts` there."""

    def __init__(self, renderer: Renderer, lay_out: LayOut, end_texts: Sequence[str]) -> None:
        self._renderer, self._lay_out, self._end_texts = _watched(renderer), lay_out, end_texts
        self._shapes: dict[tuple[str, ...], _Shape | None] = {}

    def layout(self, messages: Sequence[ChatMessage]) -> Layout | None:
        """The layout of messages of roles and contents; None where it has to be made by rendering them."""
        contents = [message["content"] for message in messages]
        if set(map(len, messages)) != {2} or not all(map(_is_text, contents)):
            return None
        roles = tuple([message["role"] for message in messages])
        if roles not in self._shapes:
            if len(self._shapes) >= _MOST:
                return None
            self._shapes[roles] = self._shape_of(roles)
        shape = self._shapes[roles]
        if shape is None or not all(map(shape.conditions.hold, contents)):
            return None
        return shape.layout(contents)

    def _shape_of(self, roles: Sequence[str]) -> _Shape | None:
        if self._renderer is None:
            return None
        conditions = _Conditions(without=set(self._end_texts))
        nonce = secrets.token_hex(8)
        contents = [f"{_OPENING}{nonce}:{number}{_CLOSING}" for number in range(len(roles))]
        messages: list[ChatMessage] = [
            {"role": role, "content": _Content.of(text, conditions)}
            for role, text in zip(roles, contents, strict=True)
        ]
        try:
            layout = self._lay_out(self._renderer, messages, ())
            # where `generation` is tracked, transformers renders copies, which notice nothing
            self._renderer.plain(messages, (), False)
        except (_LookedInto, DataError, jinja2.TemplateError, TypeError):
            return None
        pieces = re.split(f"{_OPENING}{nonce}:(\\d+){_CLOSING}", str.__str__(layout.text))
        order = tuple(map(int, pieces[1::2]))
        if layout.rewritten or set(order) != set(range(len(roles))):
            return None
        lengths = [len(piece) for piece in pieces[::2]]
        starts = [0]
        for number, length in zip(order, lengths, strict=False):
            starts.append(starts[-1] + length + len(contents[number]))

        def place(position: int) -> _Place | None:
            for part, (start, length) in enumerate(zip(starts, lengths, strict=True)):
                if start <= position <= start + length:
                    return _Place(part, position - start)
            return None

        cuts = tuple(map(place, layout.cuts))
        answers = tuple((a.message, place(a.start), place(a.stop), place(a.end)) for a in layout.answers)
        if None in cuts or any(None in answer for answer in answers):
            return None
        return _Shape(tuple(pieces[::2]), order, cuts, answers, conditions)  # type: ignore[arg-type]
