"""Where in a rendered conversation a part of one message stands, in characters and in tokens; and whether it does.

A template may trim what it is given, write it twice or leave it out; so the message is rendered once more with a word
that nobody writes in the place of its text, and what stands where that word was is compared with the text.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from luthier.data.rendering import ChatMessage, Layout
from luthier.data.thinking import Reasoning
from luthier.types import Message, Part, RowError

_WORD = "".join(chr(0xF0300 + step * 37 % 256) for step in range(6))


@dataclass(frozen=True, slots=True)
class Said:
    """Messages as their rows have them (`plain`), and as the template is given them (`given`): special tokens are
    `spelled` there so that they stay text, and reasoning is in the field `reasoning`."""

    plain: Sequence[Message]
    given: Sequence[ChatMessage]
    reasoning: str | None
    spelled: Callable[[str], str]

    def characters(
        self,
        part: Part,
        text: str,
        rendered: Callable[[Sequence[ChatMessage]], str],
        ends: Sequence[str],
    ) -> tuple[int, int]:
        """Characters [start, stop) of `text`, the rendering of `given`, that a part has become.

        (0, 0) where the template does not show the part's text at all; RowError where it shows it changed or more than
        once. ends: spellings of the tokens that end a turn.
        """
        message = self.plain[part.message]
        plain = (message.content if part.of == "content" else message.reasoning) or ""
        key = "content" if part.of == "content" else self.reasoning or ""
        other = rendered(
            [turn | {key: _WORD} if k == part.message else turn for k, turn in enumerate(self.given)]
        )
        at, length = other.find(_WORD), len(text) - len(other) + len(_WORD)
        once = other.count(_WORD) < 2
        if at < 0 or (once and length <= 0):
            return 0, 0
        shown, whole = text[at : at + length], self.spelled(plain)
        # what a template trims is white space at both ends
        if not once or other[:at] != text[:at] or shown.strip() != whole.strip():
            raise RowError(f"the template changes the {part.of} of a message that has weights of its own")
        trimmed = whole.find(shown)
        start, stop = (
            at + min(max(len(self.spelled(plain[:bound])) - trimmed, 0), length)
            for bound in (part.start, part.stop)
        )
        end = (
            next((end for end in ends if text.startswith(end, stop)), "")
            if part.ends and stop > start
            else ""
        )
        return start, stop + len(end)


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of the text that was tokenized alone: the characters of the text that are asked for, where they stand in
    the piece, and where its tokens start and end there."""

    wanted: Sequence[int]
    inside: Sequence[int]
    offsets: Sequence[tuple[int, int]]


def tokens_of(
    places: Sequence[tuple[int, int]], length: int, pieces: Callable[[Sequence[int]], Iterable[Piece]]
) -> tuple[tuple[int, int], ...]:
    """Tokens [start, stop) of characters [start, stop) of a text of `length` characters.

    A token across a bound belongs to what its last character belongs to: a word that is marked without the space before
    it is marked whole.
    """
    at: dict[int, int] = {}
    before = 0
    for piece in pieces(sorted({bound for place in places for bound in place})):
        ends = [end for _, end in piece.offsets]
        at |= {b: before + bisect_right(ends, i) for b, i in zip(piece.wanted, piece.inside, strict=True)}
        before += len(ends)
    at[length] = before
    return tuple((at[start], at[stop]) for start, stop in places)


def _texts(content: str | list[dict[str, str]]) -> list[str]:
    """The texts of a content, which with media is a list of parts, without what templates trim."""
    texts = [content] if isinstance(content, str) else [p["text"] for p in content if p["type"] == "text"]
    return [text.strip() for text in texts]


def _shown(content: str, text: str) -> bool:
    """Whether a template shows a content, as it is or as a JSON string (Llama 3.1's tool results)."""
    return content in text or json.dumps(content, ensure_ascii=False)[1:-1] in text


def require_shown(messages: Sequence[ChatMessage], layout: Layout, reasoning: Reasoning, name: str) -> None:
    """Raise RowError where a template loses content, or the reasoning of an answer that is learnt here.

    It may move and trim them, and leave out the reasoning of earlier answers; those it shows otherwise than they were
    generated, so they are learnt elsewhere (`Layout.rewritten`).
    """
    text, learnt = layout.text, {answer.message for answer in layout.answers}
    for k, message in enumerate(messages):
        for content in _texts(message["content"]):
            thinks = "</think>" in content
            if not _shown(content, text) and not (thinks and (k not in learnt or reasoning.taken_out)):
                what = "the reasoning of an answer" if thinks else f"a {message['role']} message"
                raise RowError(f"template {name!r} leaves out {what}", repr(content[:60]))
        why = message.get(reasoning.field or "") if k in learnt and not reasoning.taken_out else None
        if why and why.strip() not in text:
            raise RowError(f"template {name!r} leaves out the reasoning of an answer", repr(why[:60]))
