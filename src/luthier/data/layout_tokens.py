"""Layouts -> token ids, piece by piece, with the token index of every boundary.

tokens(layout, marked)        -> Tokens     one layout
tokens.of_many(layouts)       -> Tokens     many at once, where words tell
tokens.exactly(...)           -> Tokens     by the tokenizer alone, for what checks the others
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer

from luthier.data.rendering import Layout
from luthier.data.specials import SpecialText
from luthier.data.word_batches import Ids, WordTable
from luthier.data.word_tokens import Request, WordTokens
from luthier.types import RowError

Tokens = tuple[list[int], dict[int, int]]
"""Ids, and the number of tokens before every boundary of the layout (character -> token)."""

_REMEMBERED = 16
"""Pieces: the prompts of a conversation begin with the same ones."""


class LayoutTokens:
    """Tokenizes the texts of one tokenizer; `pieces`: they are cut even where its tokens do not allow it."""

    def __init__(self, description: str, pieces: bool) -> None:
        self._description = description
        self.backend = Tokenizer.from_str(description)
        self.backend.no_padding()
        self.backend.no_truncation()
        self.specials = SpecialText(self.backend)
        self._remembered = lru_cache(_REMEMBERED)(self._ids_of_piece)
        self.cuts = pieces or self._can_be_split()
        """Whether the pieces of a text are tokenized one by one."""

    def __getstate__(self) -> dict[str, Any]:
        """Without the table, which is made anew from the words."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_table", "_remembered")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._remembered = lru_cache(_REMEMBERED)(self._ids_of_piece)

    @cached_property
    def _words(self) -> WordTokens | None:
        """Made with the first text that is trained: whoever only answers has few, and starts sooner without."""
        return WordTokens.of(self._description)

    @cached_property
    def _table(self) -> WordTable | None:
        return None if self._words is None or not WordTable.holds(self._words) else WordTable(self._words)

    def __call__(self, layout: Layout, marked: bool) -> Tokens:
        """Of one layout. Raises RowError where a text that is tokenized whole hides the end of a prompt."""
        if not marked and self._words is not None:
            found = self._words.pieces(_request(layout if self.cuts else _uncut(layout)))
            if found is not None:
                return self._checked(layout, marked, found)
        return self.exactly(layout, marked)

    def of_many(self, layouts: Sequence[Layout]) -> list[tuple[Ids, dict[int, int]] | None]:
        """The same of many unmarked ones at once; None where the words of one do not tell, or it has to be checked."""
        if not self.cuts or self._table is None:
            return [None] * len(layouts)
        return self._table.pieces([_request(layout) for layout in layouts])

    def exactly(self, layout: Layout, marked: bool) -> Tokens:
        """By the tokenizer itself."""
        return self._checked(layout, marked, self._encoded(layout if self.cuts else _uncut(layout), marked))

    def ids_of(self, layout: Layout, marked: bool) -> list[int]:
        """The ids alone, by the tokenizer itself."""
        bounds = sorted({0, len(layout.text), *(layout.cuts if self.cuts else ())})
        pieces = (self.piece(layout.text, a, b, (), marked)[0] for a, b in pairwise(bounds))
        return [index for piece in pieces for index in self._remembered(piece, marked)]

    def text(self, text: str) -> list[int]:
        """The ids of a text without special tokens in it."""
        found = None if self._words is None else self._words.ids(text)
        return self.ids(text) if found is None else found

    def ids(self, text: str) -> list[int]:
        """The ids of a text by the tokenizer itself."""
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def encode(self, text: str, marked: bool) -> Any:
        """The tokenizer's own answer, with the places of tokens."""
        if marked:
            return self.specials.encode_respelled(text)
        return self.backend.encode(text, add_special_tokens=False)

    def _ids_of_piece(self, text: str, marked: bool) -> list[int]:
        if marked:
            return list(self.specials.encode_respelled(text).ids)
        found = self.backend.encode_batch_fast([text], add_special_tokens=False)  # without places in the text
        return list(found[0].ids)

    def _encoded(self, layout: Layout, marked: bool) -> Tokens:
        inner = _inner(layout)
        cuts = sorted({*layout.cuts, 0, len(layout.text)})
        ids: list[int] = []
        at = {0: 0}
        for left, right in pairwise(cuts):
            wanted = sorted(position for position in inner if left < position < right)
            text, places = self.piece(layout.text, left, right, wanted, marked)
            encoding = self.encode(text, marked)
            if places:
                offsets = encoding.offsets
                for position, place in zip(wanted, places, strict=True):
                    at[position] = len(ids) + bisect_left(offsets, (place,))
            ids += encoding.ids
            at[right] = len(ids)
        return ids, at

    def piece(
        self, text: str, left: int, right: int, wanted: Sequence[int], marked: bool
    ) -> tuple[str, list[int]]:
        """A piece of the text as it is tokenized, and the wanted positions inside it."""
        if not marked:
            return text[left:right], [position - left for position in wanted]
        bounds = [left, *wanted, right]
        parts = [self.specials.respell(text[a:b]) for a, b in pairwise(bounds)]
        places, length = [], 0
        for part in parts[:-1]:
            length += len(part)
            places.append(length)
        return "".join(parts), places

    def _checked(self, layout: Layout, marked: bool, found: Tokens) -> Tokens:
        """For tokenizers that cannot be given pieces: each prompt is compared with the beginning of the whole."""
        if self.cuts:
            return found
        ids, at = found
        for answer in layout.answers:
            prompt, _ = self.piece(layout.text, 0, answer.start, (), marked)
            if list(self.encode(prompt, marked).ids) != ids[: at[answer.start]]:
                raise RowError(
                    "the tokenizer merges the prompt's end with the answer's beginning",
                    f"at {layout.text[max(0, answer.start - 15) : answer.start + 15]!r}",
                )
        return found

    def _can_be_split(self) -> bool:
        """Whether tokens of two texts, one after the other, are the tokens of one text."""
        for left, right in (("ab:", "cd"), ("a\n", "b"), ("a", " b")):
            ids = [*self.ids(left), *self.ids(right)]
            if self.backend.decode(ids, skip_special_tokens=False) != left + right:
                return False
        return True


def _inner(layout: Layout) -> set[int]:
    return {position for a in layout.answers for position in (a.start, a.stop, a.end)}


def _request(layout: Layout) -> Request:
    return Request.of(layout.text, layout.cuts, _inner(layout))


def _uncut(layout: Layout) -> Layout:
    return Layout(layout.text, (), layout.answers, layout.rewritten)
