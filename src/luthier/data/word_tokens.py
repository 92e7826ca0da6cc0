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
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
from tokenizers import Tokenizer

_BESIDE = re.compile(r" (?:(?<=\s )|(?=\s))")
"""A space beside another kind of white space, or of its own: the pattern decides how they are shared out."""
_HELD = chr(0xF0006)
"""Stands for such a space, where words are told from each other by spaces."""
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


class WordTokens:
    """The ids that `backend` gives, without their places."""

    def __init__(self, backend: Tokenizer, added: dict[str, int], composes: bool) -> None:
        self._added = {text: _bytes([index]) for text, index in added.items()}
        self._spellings, self._composes = tuple(added), composes
        pattern = "|".join(map(re.escape, sorted(added, key=len, reverse=True)))
        self._split = re.compile(f"({pattern})") if added else None
        self._first, self._after = _Words(backend, ""), _Words(backend, " ")

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
        found = cls(backend, spellings, composes)
        same = (found.ids(text) in (None, _ids(backend, text)) for text in _trials(spellings))
        return found if all(same) else None

    def ids(self, text: str) -> list[int] | None:
        """Ids of a text, without tokens that a tokenizer adds at its ends; None where its words do not tell."""
        found: list[bytes] = []
        return _numbers(found) if self._add(text, found) else None

    def _add(self, text: str, found: list[bytes]) -> bool:
        """Append the ids of a text, as the bytes of int32; False where its words do not tell."""
        if not text.isascii() and (
            _HELD in text or (self._composes and not unicodedata.is_normalized("NFC", text))
        ):
            return False
        if self._split is None:
            self._add_segment(text, found)
            return True
        for number, part in enumerate(self._split.split(text)):
            if number % 2:
                found.append(self._added[part])
            elif part:
                self._add_segment(part, found)
        return True

    def pieces(
        self, text: str, cuts: Collection[int], places: Collection[int]
    ) -> tuple[list[int], dict[int, int]] | None:
        """Ids of a text that is cut at `cuts`, and the number of tokens before each of these and of `places`.

        None where that is not known: a place that is no cut has to be the edge of an added token.
        """
        for place in places:
            if 0 < place < len(text) and place not in cuts and not self._is_edge(text, place):
                return None
        found: list[bytes] = []
        at = {0: 0}
        left = counted = length = 0
        for right in sorted({*cuts, *places, len(text)}):
            if not self._add(text[left:right], found):
                return None
            length += sum(map(len, found[counted:]))
            counted = len(found)
            at[right] = length // _ID_BYTES
            left = right
        return _numbers(found), at

    def _is_edge(self, text: str, place: int) -> bool:
        return text.endswith(self._spellings, 0, place) or text.startswith(self._spellings, place)

    def _add_segment(self, text: str, found: list[bytes]) -> None:
        first, *others = _BESIDE.sub(_HELD, text).split(" ")
        found.append(self._first[first])
        found += map(self._after.__getitem__, others)


class _Words(dict[str, bytes]):
    """Ids of words that stand behind `before`, as the bytes of int32: one object for a word, however many its ids."""

    def __init__(self, backend: Tokenizer, before: str) -> None:
        super().__init__()
        self._backend, self._before = backend, before

    def __missing__(self, word: str) -> bytes:
        ids = _bytes(_ids(self._backend, self._before + word.replace(_HELD, " ")))
        if len(self) < _MOST and len(word) <= _LONGEST:
            self[word] = ids
        return ids


def _bytes(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, np.int32).tobytes()


def _numbers(found: Iterable[bytes]) -> list[int]:
    ids: list[int] = np.frombuffer(b"".join(found), np.int32).tolist()
    return ids


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
        yield f"{left} {right}"
    for token, other in product(tokens, _TRIED):
        yield f"{other} {token} {other}{token}{other}\n{other}"
    yield "".join(f"{other}  {other}\n {other} \n\n  {other}\t {other}  " for other in _TRIED)
