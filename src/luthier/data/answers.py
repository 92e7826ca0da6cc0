"""The columns that hold answers: one answer, the better and the worse one of a pair, a label, a margin.

    answered(raw, attr)      -> the conversation with its answer
    posed(raw, attr)         -> the same, or the question alone where the row has no answer
    pair(raw, attr)          -> the same with the better and with the worse answer
    is_desirable(raw, attr)  -> what columns.kto_tag says
    margin_of(raw, attr)     -> what columns.margin says

Raises `RowError` and `DataError` as `formats` says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from luthier.data.chats import asked, conversation, history, message
from luthier.data.read import RawRow
from luthier.data.registry import DatasetAttr
from luthier.types import Conversation, Message, RowError


def answered(raw: RawRow, attr: DatasetAttr) -> Conversation:
    """Alpaca's question with its answer, or the messages as they are."""
    if attr.formatting != "alpaca":
        return history(raw, attr)
    before = asked(raw, attr)
    return _continued(before, [Message("assistant", _answer_text(raw, attr.columns.response, "response"))])


def posed(raw: RawRow, attr: DatasetAttr) -> Conversation:
    """`answered`, or the question alone where there is no column for the answer, or nothing in it."""
    if attr.formatting != "alpaca":
        return history(raw, attr)
    column = attr.columns.response
    value = raw.columns.get(column) if column else None
    return asked(raw, attr) if value is None or value == "" else answered(raw, attr)


def pair(raw: RawRow, attr: DatasetAttr) -> tuple[Conversation, Conversation]:
    """The conversation with the better answer, and with the worse one.

    Alpaca's columns hold texts. In the other formats an answer is a text, a message, a list of messages that begins
    with the assistant's, or a whole conversation, prompt included: where there is no messages column, or where the
    list begins with somebody else.
    """
    return _side(raw, attr, attr.columns.chosen, "chosen"), _side(
        raw, attr, attr.columns.rejected, "rejected"
    )


def is_desirable(raw: RawRow, attr: DatasetAttr) -> bool:
    """The label: true or false, or 1 or 0; their text where the file knows nothing else (CSV)."""
    value = raw.columns.get(attr.columns.kto_tag) if attr.columns.kto_tag else None
    if value is None:
        raise RowError("no label", f"{raw.place}, {attr.columns.kto_tag}")
    if isinstance(value, str):
        value = {"true": 1, "1": 1, "false": 0, "0": 0}.get(value.strip().lower(), value)
    if not isinstance(value, int) or value not in (0, 1):
        raise RowError("label is not true or false", f"{raw.place}: {value!r}")
    return bool(value)


def margin_of(raw: RawRow, attr: DatasetAttr) -> float | None:
    """By how much the better answer is better; None where the data does not say."""
    value = raw.columns.get(attr.columns.margin) if attr.columns.margin else None
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RowError("margin is not a number", f"{raw.place}: {value!r}")
    return float(value)


def _side(raw: RawRow, attr: DatasetAttr, column: str | None, key: str) -> Conversation:
    if attr.formatting == "alpaca":
        return _continued(asked(raw, attr), [Message("assistant", _answer_text(raw, column, key))])
    value, place = _value(raw, column, key), f"{raw.place}, {column}"
    if isinstance(value, str):
        return _continued(history(raw, attr), [Message("assistant", value)])
    if isinstance(value, Mapping):
        return _continued(history(raw, attr), [message(value, place, attr)])
    if not isinstance(value, Sequence):
        raise RowError("answer is neither text nor messages", f"{place} is {type(value).__name__}")
    if not value:
        raise RowError("no answer", place)
    if not _has_messages(raw, attr):
        return conversation(value, raw, attr, place)
    turns = [message(turn, f"{place}, message {i}", attr) for i, turn in enumerate(value)]
    if turns[0].role != "assistant":
        return conversation(value, raw, attr, place)
    return _continued(history(raw, attr), turns)


def _has_messages(raw: RawRow, attr: DatasetAttr) -> bool:
    column = attr.columns.messages
    return column is not None and (column in raw.columns or "messages" in attr.named)


def _continued(before: Conversation, turns: Sequence[Message]) -> Conversation:
    return Conversation((*before.messages, *turns), before.tools)


def _answer_text(raw: RawRow, column: str | None, key: str) -> str:
    value = _value(raw, column, key)
    if not isinstance(value, str):
        raise RowError("answer is not text", f"{raw.place}: {column!r} is {type(value).__name__}")
    return value


def _value(raw: RawRow, column: str | None, key: str) -> Any:
    if column is None:
        raise RowError(f"no column for the answer: name it in columns.{key}", raw.place)
    if column not in raw.columns:
        raise RowError(f"no column {column!r} with the answer", raw.place)
    value = raw.columns[column]
    if value is None:
        raise RowError("no answer", f"{raw.place}, {column}")
    return value
