"""The text of an answer -> what the model thought, between <think> and </think>, and what it said then."""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"


def split_reasoning(text: str, *, opened: bool = False, ended: bool = True) -> tuple[str | None, str]:
    """Reasoning, or None where there is none, and the answer proper; newlines between them belong to neither.

    opened: the prompt itself ends with <think>. ended: nothing more follows; else what may be the beginning of a mark
    is in neither part yet.
    """
    body = text
    if not opened:
        start = text.lstrip()
        if not start.startswith(OPEN):
            undecided = not ended and OPEN.startswith(start)
            return None, "" if undecided else text
        body = start.removeprefix(OPEN)
    reasoning, closed, answer = body.partition(CLOSE)
    if not closed and not ended:
        reasoning = reasoning[: len(reasoning) - _held(reasoning)]
    return reasoning.strip("\n"), answer.lstrip("\n")


def _held(text: str) -> int:
    """Characters at the end that may be the beginning of the closing mark."""
    sizes = range(min(len(CLOSE) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(CLOSE[:size])), 0)


class ReasoningStream:
    """The same for text that comes in pieces: put together, its pieces are the two parts of the whole."""

    def __init__(self, *, opened: bool = False) -> None:
        self._opened = opened
        self._text = ""
        self._reasoning = self._answer = 0

    def push(self, piece: str) -> tuple[str, str]:
        """What can be shown now, of the reasoning and of the answer."""
        self._text += piece
        return self._show(ended=False)

    def finish(self) -> tuple[str, str]:
        """The rest of both."""
        return self._show(ended=True)

    def _show(self, *, ended: bool) -> tuple[str, str]:
        reasoning, answer = split_reasoning(self._text, opened=self._opened, ended=ended)
        shown = (reasoning or "")[self._reasoning :], answer[self._answer :]
        self._reasoning += len(shown[0])
        self._answer += len(shown[1])
        return shown
