"""Samples token by token: what each token says, visibly, and whether it is learnt."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

from luthier.data.media_template import MediaTemplate
from luthier.data.template import ChatTemplate
from luthier.show import answer_bounds, answer_titles
from luthier.types import Sample

REPLACEMENT = "\ufffd"
SPACE = "\u2581"
"""What SentencePiece writes for a space; decoding a token alone would lose it."""
VISIBLE = {"\n": "↵", "\r": "␍", "\t": "⇥"}


@dataclass(frozen=True, slots=True)
class Token:
    """`text` is what a person sees: line breaks, tabs, bytes and control characters by a sign. `weight` is its
    loss weight as a target, 0 where it is only context; a first token never is a target."""

    id: int
    text: str
    weight: float

    @property
    def learnt(self) -> bool:
        return self.weight > 0


@dataclass(frozen=True, slots=True)
class ShownAnswer:
    """One of the answers that continue a prompt; `name` is what the data calls it, such as `chosen`."""

    name: str
    tokens: tuple[Token, ...]

    @property
    def learnt(self) -> int:
        return sum(token.learnt for token in self.tokens)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "learnt": self.learnt, "tokens": _dicts(self.tokens)}


@dataclass(frozen=True, slots=True)
class ShownSample:
    """One sample of a data set: a sequence, or a prompt and the answers that continue it."""

    dataset: str
    row: int
    tokens: tuple[Token, ...]
    answers: tuple[ShownAnswer, ...] = ()

    @property
    def learnt(self) -> int:
        own = sum(token.learnt for token in self.tokens)
        return own + sum(answer.learnt for answer in self.answers)

    def to_dict(self) -> dict[str, Any]:
        return {
            "dataset": self.dataset,
            "row": self.row,
            "learnt": self.learnt,
            "tokens": _dicts(self.tokens),
            "answers": [answer.to_dict() for answer in self.answers],
        }


def _dicts(tokens: Sequence[Token]) -> list[dict[str, Any]]:
    return [asdict(token) | {"learnt": token.learnt} for token in tokens]


def chosen(samples: Sequence[Sample], number: int) -> list[Sample]:
    """`number` samples that lie evenly in the table, the first among them; so every data set has its share."""
    number = min(number, len(samples))
    return [samples[turn * len(samples) // number] for turn in range(number)]


def show_sample(sample: Sample, template: ChatTemplate) -> ShownSample:
    tokens = tuple(
        Token(int(token), token_text(int(token), template), round(float(weight), 6) if place else 0.0)
        for place, (token, weight) in enumerate(zip(sample.input_ids, sample.weights, strict=True))
    )
    prompt = sample.branches[0] if sample.branches else len(sample)
    answers = zip(answer_titles(sample), answer_bounds(sample), strict=True)
    shown = tuple(ShownAnswer(title, tokens[start:stop]) for title, (start, stop) in answers)
    stands = template.reader.token_ids() if isinstance(template, MediaTemplate) else frozenset()
    return ShownSample(sample.source, sample.index, runs_together(tokens[:prompt], stands), shown)


def runs_together(tokens: Sequence[Token], stands: frozenset[int]) -> tuple[Token, ...]:
    """The tokens, a run of one that stands for media being one with its number; they are all alike, and many."""
    runs = groupby(enumerate(tokens), key=lambda at: at[1].id if at[1].id in stands else (at[0],))
    seen = ([token for _, token in run] for _, run in runs)
    return tuple(
        replace(run[0], text=f"{run[0].text} x {len(run)}") if len(run) > 1 else run[0] for run in seen
    )


def token_text(token: int, template: ChatTemplate) -> str:
    """One token for the eye. Bytes that are no whole character are shown in hexadecimal."""
    piece = template.tokenizer.convert_ids_to_tokens(token)
    assert isinstance(piece, str)
    if SPACE in piece:
        return visible(piece.replace(SPACE, " "))
    text = template.decode([token])
    if REPLACEMENT not in text:
        return visible(text)
    data = [_BYTES.get(character) for character in piece]
    known = [byte for byte in data if byte is not None]
    return "".join(f"<{byte:02X}>" for byte in known) if len(known) == len(data) else visible(piece)


def visible(text: str) -> str:
    """The text with every character that would not be seen, or would steer a terminal, spelled out."""
    return "".join(VISIBLE.get(character) or _spelled(character) for character in text)


def _spelled(character: str) -> str:
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    return f"<U+{ord(character):04X}>" if hidden else character


def _byte_alphabet() -> dict[str, int]:
    """The character that byte-level tokenizers write for each byte (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


_BYTES = _byte_alphabet()
