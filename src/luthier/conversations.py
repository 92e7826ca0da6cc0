"""Data before tokens: messages, conversations, and a row of a data file in the form that stages take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One function call of the assistant; `arguments` is a JSON object or the text that stood in its place."""

    name: str
    arguments: Mapping[str, Any] | str
    id: str | None = None


MediaKind = Literal["image", "video", "audio"]


@dataclass(frozen=True, slots=True)
class Media:
    """An image, a film or a sound in a message.

    `source` is the path of its file, or those of a film's frames in order; nothing is opened before a sample is
    collated. `at` is the number of characters of the message's content that stand before it.
    """

    kind: MediaKind
    source: str | tuple[str, ...]
    at: int = 0


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    `role` is any role that the template can render (system, user, assistant, tool, ...).
    `weight` is the loss weight of the turn's own tokens; None means the stage's rule (answers 1, the rest 0).
    """

    role: str
    content: str = ""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    weight: float | None = None
    spans: tuple[tuple[int, int, float], ...] = ()
    """Loss weights of parts of the content of an answer: characters [start, stop) and their weight; the rest has
    `weight`."""
    media: tuple[Media, ...] = ()
    """In the order in which they stand in the content."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order, and the tools that the assistant may call (JSON schemas)."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data file, after its format has been read.

    A conversation, or plain text; for preference learning a conversation that ends with the better answer and
    `rejected`, the same with the worse one; or a conversation and whether its answer is `desirable`.
    """

    source: str
    """Name of the data set."""
    index: int
    """Position in the data set as it was read, from 0."""
    conversation: Conversation | None = None
    text: str | None = None
    rejected: Conversation | None = None
    desirable: bool | None = None
    margin: float | None = None
    """By how much the better answer is better, where the data says so."""
