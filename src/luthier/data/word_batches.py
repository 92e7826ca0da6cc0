"""Token ids of many texts at once, from those of their words: what `WordTokens` does, without a step for each word.

The words of all texts are one Arrow array. Each is found in a table of those that were seen before, and the ids come
out of one gather. What is told apart is the same: words between single spaces; white space beside a space belongs to
the words on both sides of it, which are looked up together.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from luthier.data.word_tokens import HELD, Request, WordTokens

_MOST, _MOST_BYTES = 1 << 18, 1 << 26
"""Words of a table, and bytes of their spellings; it is begun anew before it has more."""
_EMPTY, _LEADS, _TRAILS, _BREAKS, _LETTER = 1, 2, 4, 8, 16

Ids = np.ndarray[Any, np.dtype[np.int32]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]
Ints = np.ndarray[Any, np.dtype[np.int64]]


class WordTable:
    """Spellings that were seen, each with its ids at the beginning of a text and behind a space."""

    @staticmethod
    def holds(words: WordTokens) -> bool:
        """Whether its added tokens can be words of a table."""
        return not any(" " in token for token in words.added)

    def __init__(self, words: WordTokens) -> None:
        self._words = words
        self._begin()

    def _begin(self) -> None:
        self._spellings = pa.array([], pa.string())
        self._kinds = np.zeros(0, np.uint8)
        self._starts, self._lengths = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._ids, self._used = np.zeros(1 << 16, np.int32), 0
        self._add(pa.array(list(self._words.added), pa.string()))
        for number, ids in enumerate(self._words.added.values()):
            self._keep(2 * number, np.frombuffer(ids, np.int32))

    def pieces(self, requests: Sequence[Request]) -> list[tuple[Ids, dict[int, int]] | None]:
        """For each request what `WordTokens.pieces` gives, the ids as an array."""
        segments: list[str] = []
        cut = [self._cut(request, segments) for request in requests]
        ids, ends = self._tokens(segments) if segments else (np.zeros(0, np.int32), np.zeros(1, np.int64))
        found: list[tuple[Ids, dict[int, int]] | None] = []
        for request, counts in zip(requests, cut, strict=True):
            if counts is None:
                found.append(None)
                continue
            places = ends[counts]
            at = dict(zip((0, *request.bounds), (places - places[0]).tolist(), strict=True))
            found.append((ids[places[0] : places[-1]], at))
        return found

    def _cut(self, request: Request, segments: list[str]) -> list[int] | None:
        """Append the segments of a text; the number of segments before it and before each of its bounds."""
        if not self._words.tells(request):
            return None
        counts, left = [len(segments)], 0
        for right in request.bounds:
            segments += filter(None, self._words.segments(request.text[left:right]))
            counts.append(len(segments))
            left = right
        return counts

    def _tokens(self, segments: list[str]) -> tuple[Ids, Ints]:
        """The ids of segments one after the other, and how many there are before each of them, and in all."""
        if len(self._spellings) > _MOST or self._spellings.nbytes > _MOST_BYTES:
            self._begin()
        split = pc.split_pattern(pa.array(segments, pa.string()), " ")
        bounds = split.offsets.to_numpy().astype(np.int64)
        words = split.values
        begins = np.zeros(len(words), bool)
        begins[bounds[:-1]] = True
        numbers = self._numbers_of(words)
        rows = 2 * numbers + ~begins
        kept = np.ones(len(words), bool)
        runs = self._runs(self._kinds[numbers], begins)
        if len(runs):
            held = [HELD.join(words.slice(a, b - a).to_pylist()) for a, b in runs.tolist()]
            for first, stop in runs.tolist():
                kept[first + 1 : stop] = False
            firsts = runs[:, 0]
            rows[firsts] = 2 * self._numbers_of(pa.array(held, pa.string())) + ~begins[firsts]
        return self._gathered(rows[kept], np.concatenate(([0], np.cumsum(kept)))[bounds])

    def _runs(self, kinds: np.ndarray[Any, np.dtype[np.uint8]], begins: Bools) -> Ints:
        """[first, stop) of words that share white space with each other."""
        ends = ((kinds & _TRAILS) != 0) & ~(begins & ((kinds & _EMPTY) != 0))
        leads, breaks, letter = ((kinds & kind) != 0 for kind in (_LEADS, _BREAKS, _LETTER))
        shared = (ends[:-1] | leads[1:]) & ~begins[1:] & ~(breaks[:-1] & letter[1:])
        edges = np.diff(np.concatenate(([0], shared, [0])).astype(np.int8))
        firsts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1) + 1
        return np.stack((firsts, stops), axis=1)

    def _gathered(self, rows: Ints, bounds: Ints) -> tuple[Ids, Ints]:
        self._make(np.unique(rows[self._lengths[rows] < 0]))
        lengths = self._lengths[rows]
        ends = np.concatenate(([0], np.cumsum(lengths)))
        places = np.repeat(self._starts[rows] - ends[:-1], lengths) + np.arange(ends[-1])
        return self._ids[places], ends[bounds]

    # ---- the table ---------------------------------------------------------------------------------

    def _numbers_of(self, words: Any) -> Ints:
        """The numbers of words in the table; those that are new are added."""
        found = self._found(words, self._spellings)
        new = found < 0
        if new.any():
            missing = words.filter(pa.array(new))
            unique, before = missing.unique(), len(self._spellings)
            self._add(unique)
            found[new] = before + self._found(missing, unique)
        return found

    @staticmethod
    def _found(words: Any, among: Any) -> Ints:
        numbers: Ints = pc.fill_null(pc.index_in(words, value_set=among), -1).to_numpy().astype(np.int64)
        return numbers

    def _add(self, words: Any) -> None:
        kinds = np.asarray([self._kind(word) for word in words.to_pylist()], np.uint8)
        unknown = np.full(2 * len(words), -1)
        self._spellings = pa.concat_arrays([self._spellings, words])
        self._kinds = np.concatenate((self._kinds, kinds))
        self._starts = np.concatenate((self._starts, unknown))
        self._lengths = np.concatenate((self._lengths, unknown))

    def _kind(self, word: str) -> int:
        if not word:
            return _EMPTY | _LEADS | _TRAILS
        leads, trails = not word[0].strip(), not word[-1].strip()
        breaks = self._words.lines and word[-1] == "\n" and word[-2:-1].strip() not in ("", HELD)
        letter = word[0] in string.ascii_letters
        return leads * _LEADS | trails * _TRAILS | breaks * _BREAKS | letter * _LETTER

    def _make(self, rows: Ints) -> None:
        parts = (self._words.heads, self._words.groups)
        texts = self._spellings.take(pa.array(rows >> 1)).to_pylist()
        for row, text in zip(rows.tolist(), texts, strict=True):
            self._keep(row, np.frombuffer(parts[row & 1].make(text), np.int32))

    def _keep(self, row: int, ids: Ids) -> None:
        stop = self._used + len(ids)
        if stop > len(self._ids):
            self._ids = np.concatenate((self._ids, np.zeros(max(len(self._ids), len(ids)), np.int32)))
        self._ids[self._used : stop] = ids
        self._starts[row], self._lengths[row], self._used = self._used, len(ids), stop
