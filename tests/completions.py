"""Prompts and completions as a rollout has them, from plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from luthier.conversations import Conversation, Message
from luthier.experience import Completion, Prompt


def prompt(text: str = "How many?", index: int = 0, label: str | None = None, **row: Any) -> Prompt:
    """A prompt of one turn; its tokens are the letters."""
    ids = tuple(ord(letter) % 200 for letter in text)
    return Prompt("sums", index, ids, Conversation((Message("user", text),)), label, row)


def completion(text: str, asked: Prompt | None = None, length: int | None = None) -> Completion:
    """An answer of `length` tokens, of as many as it has letters and one to stop where that is not given."""
    tokens = len(text) + 1 if length is None else length
    zeros = np.zeros(tokens, np.float32)
    return Completion(asked or prompt(), np.arange(3, 3 + tokens, dtype=np.int32), zeros, text, "stop")


def answers(
    texts: Sequence[str], label: str | None = None, row: Mapping[str, Any] | None = None
) -> list[Completion]:
    """One answer to each of as many prompts, whose rows are numbered from 0."""
    return [completion(text, prompt(index=i, label=label, **(row or {}))) for i, text in enumerate(texts)]
