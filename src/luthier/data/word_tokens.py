"""Token ids of a text from those of its words, which mostly have been seen before.

A byte-level BPE tokenizer cuts a text at its added tokens, then by a pattern, and merges inside of what is left; no
pattern of this field takes in the border between a character that is no space and a single space. So what lies between
two such borders has the same tokens wherever it stands, and is looked up. The tokenizer itself spends most of its time
on the pattern and on where each token came from, which nobody asks here.

Whether a tokenizer is of this kind is read from its description, and tried: see `WordTokens.of`. What is not covered
(a pattern of another kind, other normalizers, spaces beside spaces) is left to the tokenizer.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
from tokenizers import Tokenizer

HELD = chr(0xF0006)
"""Stands for a space beside another kind of white space, or of its own: the pattern decides how they are shared out."""
_LINES = re.compile(rf"(?<=[^\s{HELD}]\n)(?={HELD}?[A-Za-z]|[0-9])")
"""Borders inside of what no space divides: behind the end of a line, before what no pattern takes in with it."""
_MOST = 1 << 18
"""Words that are remembered: with their ids about 60 MB."""
_LONGEST = 64
"""Characters of a word that is remembered."""
_ID_BYTES = 4
_TRIED: tuple[str, ...] = (
    *(
        "a",
        "Z",
        "'s",
        "'",
        "7",
        "42",
        ".",
        "...",
        "-",
        "_",
        "(",
        "{",
        "\n",
        "a\n",
        "é",
        "ß",
        "中",
        "。",
        "あ",
        "한",
    ),
    *(
        "й",
        "ا",
        "अ",
        "ก",
        "e\u0301",
        "🙂",
        "👩\u200d👧",
        "\u200b",
        "\ufeff",
        "½",
        "Ⅷ",
        "€",
        "\\n",
        "/",
        "1a",
        "a1",
    ),
    *("\t", "ＡＢ", "$x$"),
)


@dataclass(frozen=True, slots=True)
class Request:
    """A text that is cut at some of its `bounds`, which end with its length; the others are `inner`.

    Of an inner one it is known how many tokens are before it only where it is the edge of an added token.
    """

    text: str
    bounds: tuple[int, ...]
    inner: tuple[int, ...]

    @classmethod
    def of(cls, text: str, cuts: Collection[int], places: Collection[int]) -> Request:
        inner = tuple(place for place in places if 0 < place < len(text) and place not in cuts)
        return cls(text, tuple(sorted({*cuts, *places, len(text)})), inner)


class WordTokens:
    """The ids that `backend` gives, without their places."""

    def __init__(self, backend: Tokenizer, added: dict[str, int], composes: bool, lines: bool) -> None:
        self.added = {text: _bytes([index]) for text, index in added.items()}
        self._spellings, self._composes = tuple(added), composes
        pattern = "|".join(map(re.escape, sorted(added, key=len, reverse=True)))
        self._split = re.compile(f"({pattern})") if added else None
        self.lines = lines
        self.heads, self.groups = _Parts(backend, "", lines), _Parts(backend, " ", lines)
        self.groups.heads = self.heads.heads = self.heads
        self.groups.groups = self.heads.groups = self.groups
        self._first, self._after = _Words(self.heads), _Words(self.groups)

    @classmethod
    @lru_cache(maxsize=4)
    def of(cls, description: str) -> WordTokens | None:
        """For tokenizers whose tokens are those of their words; None for others. `description`: `Tokenizer.to_str`.

        A BPE model over bytes, no normalizer but NFC, patterns and digits alone before it, added tokens that take in
        nothing beside them and do not overlap; and over many pairs of kinds of characters with a space between them the
        tokens of both halves are those of the whole.
        """
        backend, tree = Tokenizer.from_str(description), json.loads(description)
        backend.no_padding()
        backend.no_truncation()
        normalizer, added = tree["normalizer"], tree["added_tokens"]
        composes = normalizer is not None
        if not _is_plain(tree["model"]) or not _cuts_by_patterns(tree["pre_tokenizer"]):
            return None
        if composes and normalizer["type"] != "NFC":
            return None
        if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added):
            return None
        spellings = {token["content"]: int(token["id"]) for token in added if token["content"]}
        if _overlap(list(spellings)):
            return None
        for lines in (True, False):
            found = cls(backend, spellings, composes, lines)
            if all(found.ids(text) in (None, _ids(backend, text)) for text in _trials(spellings)):
                return found
        return None

    def ids(self, text: str) -> list[int] | None:
        """Ids of a text, without tokens that a tokenizer adds at its ends; None where its words do not tell."""
        found = self.pieces(Request.of(text, (), ()))
        return None if found is None else found[0]

    def pieces(self, request: Request) -> tuple[list[int], dict[int, int]] | None:
        """Ids of a text that is cut, and the number of tokens before each of its bounds; None where it is not known."""
        if not self.tells(request):
            return None
        found: list[bytes] = []
        at = {0: 0}
        left = length = 0
        for right in request.bounds:
            parts: list[Any] = self.segments(request.text[left:right])
            parts[::2] = map(self._segment, parts[::2])
            parts[1::2] = map(self.added.__getitem__, parts[1::2])
            found += parts
            length += sum(map(len, parts))
            at[right] = length // _ID_BYTES
            left = right
        return np.frombuffer(b"".join(found), np.int32).tolist(), at

    def tells(self, request: Request) -> bool:
        """Whether the tokens of a text are those of its words, and its places are edges of them."""
        text = request.text
        if not text.isascii() and (
            HELD in text or (self._composes and not unicodedata.is_normalized("NFC", text))
        ):
            return False
        return all(
            text.endswith(self._spellings, 0, place) or text.startswith(self._spellings, place)
            for place in request.inner
        )

    def segments(self, text: str) -> list[str]:
        """What is between added tokens, and with odd numbers these."""
        return [text] if self._split is None else self._split.split(text)

    def _segment(self, text: str) -> bytes:
        """The ids of a text without added tokens."""
        words = text.split(" ")
        if len(words) == 1:
            return self.heads[text]
        found = [self._first[words[0]], *map(self._after.__getitem__, words[1:])]
        try:
            return b"".join(found)  # type: ignore[arg-type]
        except TypeError:  # there is a None among them
            return b"".join(self._mended(words, found))

    def _mended(self, words: Sequence[str], found: Sequence[bytes | None]) -> Iterator[bytes]:
        """What was found, and for words with white space at their ends what they are with their neighbours."""

        def shared(before: int) -> bool:
            return not (words[before][-1:].strip() and words[before + 1][:1].strip())

        at = 0
        for number, ids in enumerate(found):
            if ids is not None or number < at:
                continue
            start = stop = number
            while start > at and shared(start - 1):
                start -= 1
            while stop + 1 < len(words) and shared(stop):
                stop += 1
            yield from found[at:start]  # type: ignore[misc]
            held = HELD.join(words[start : stop + 1])
            yield self.groups[held] if start else self.heads[held]
            at = stop + 1
        yield from found[at:]  # type: ignore[misc]


class _Parts(dict[str, bytes]):
    """Ids of texts that stand behind `before`, as the bytes of int32: one object for a text, however many its ids."""

    heads: _Parts
    """Those that stand behind nothing."""
    groups: _Parts
    """Those that stand behind a space."""

    def __init__(self, backend: Tokenizer, before: str, lines: bool) -> None:
        super().__init__()
        self._backend, self.before, self._lines = backend, before, lines

    def __missing__(self, text: str) -> bytes:
        ids = self.make(text)
        if len(self) < _MOST and len(text) <= _LONGEST:
            self[text] = ids
        return ids

    def make(self, text: str) -> bytes:
        """The ids, from those of the lines in it where these are told from each other."""
        if self._lines and "\n" in text:
            first, *others = _LINES.split(text)
            if others:
                rest = (self.groups[o[1:]] if o[0] == HELD else self.heads[o] for o in others)
                return b"".join((self[first], *rest))
        return _bytes(_ids(self._backend, self.before + text.replace(HELD, " ")))


class _Words(dict[str, "bytes | None"]):
    """The same of words between spaces; None for one with white space at an end, which its neighbours share."""

    def __init__(self, parts: _Parts) -> None:
        super().__init__()
        self._parts = parts

    def __missing__(self, word: str) -> bytes | None:
        begins, ends = word[:1].strip(), word[-1:].strip()
        known = ends and (begins or not self._parts.before)
        ids = self._parts.make(word) if known else None if word or self._parts.before else b""
        if len(self) < _MOST and len(word) <= _LONGEST:
            self[word] = ids
        return ids


def _bytes(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, np.int32).tobytes()


def _ids(backend: Tokenizer, text: str) -> list[int]:
    return list(
        backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
    )  # without places in the text


def _is_plain(model: dict[str, Any]) -> bool:
    return (
        model["type"] == "BPE"
        and model["dropout"] is None
        and not model["continuing_subword_prefix"]
        and not model["end_of_word_suffix"]
        and not model["byte_fallback"]
    )


def _cuts_by_patterns(step: dict[str, Any] | None) -> bool:
    """Whether what comes before the merges is cutting by patterns, and bytes for characters."""
    steps = [] if step is None else step["pretokenizers"] if step["type"] == "Sequence" else [step]
    kinds = {one["type"] for one in steps}
    bytes_ = [one for one in steps if one["type"] == "ByteLevel"]
    return (
        kinds <= {"Split", "Digits", "ByteLevel"} and len(bytes_) == 1 and not bytes_[0]["add_prefix_space"]
    )


def _overlap(tokens: Sequence[str]) -> bool:
    """Whether one token is a part of another, or begins with the end of one."""
    starts = {token[:size] for token in tokens for size in range(1, len(token))}
    return any(token[-size:] in starts for token in tokens for size in range(1, len(token))) or any(
        token in other for token in tokens for other in tokens if len(token) < len(other)
    )


def _trials(added: dict[str, int]) -> Iterator[str]:
    tokens = list(added)[:4]
    for left, right in product(_TRIED, repeat=2):
        yield f"{left} {right}\n{left}\n {right}\n\n {left}\n\n{right} \n{left} \n {right}"
    for token, other in product(tokens, _TRIED):
        yield f"{other} {token} {other}{token}{other}\n{other}"
    yield "".join(f"{other}  {other}\n {other} \n\n  {other}\t {other}  " for other in _TRIED)
