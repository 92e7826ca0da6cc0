"""Tokens that come one by one -> text that may be shown: never half a character, never a part of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from luthier.generation import Generation

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for the first bytes of a character whose others have not come."""


def up_to(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string in it."""
    return text[: min((text.index(one) for one in stop if one in text), default=len(text))]


def answer_text(answer: Generation, decode: Callable[[Sequence[int]], str]) -> str:
    """The text of an answer, up to its stop string."""
    by = answer.stopped_by
    return up_to(decode(answer.ids), [by] if isinstance(by, str) else [])


class TextStream:
    """The text of an answer in pieces that, put together, are the text of the whole answer."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self._ids: list[int] = []
        self._shown = 0

    def push(self, token: int) -> str:
        """The text that can be shown now; often none."""
        self._ids.append(token)
        text = self._decode(self._ids)
        return self._show(text, len(text) - self._held(text))

    def finish(self) -> str:
        """The rest, up to a stop string."""
        text = self._decode(self._ids)
        return self._show(text, len(text))

    def _show(self, text: str, end: int) -> str:
        end = min(end, len(up_to(text, self._stop)))
        piece = text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece

    def _held(self, text: str) -> int:
        """Characters at the end that the next token may change or cut off."""
        whole = text.rstrip(_INCOMPLETE)
        starts = (
            size
            for stop in self._stop
            for size in range(min(len(stop) - 1, len(whole)), 0, -1)
            if whole.endswith(stop[:size])
        )
        return len(text) - len(whole) + max(starts, default=0)
