"""Raw rows -> `Row`: alpaca, sharegpt, openai messages, and plain text; pairs of answers and answers with a label.

    to_row(raw, attr, kind)         -> Row
    require_kind(attr, kind, stage)    raises where the description cannot give such rows

Two kinds of trouble. A row that cannot be used (no answer, unknown role, a tool call that is not JSON) raises
`RowError`: it is dropped and counted. A file that is not what its description says (missing column, a number
where messages should be) raises `DataError` naming file and row.

Whether a sequence of roles is legal is the template's decision, not made here. No text is ever edited.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace

from luthier.data.answers import answered, is_desirable, margin_of, pair, posed
from luthier.data.chats import cell, history
from luthier.data.media import with_media
from luthier.data.read import RawRow
from luthier.data.registry import DatasetAttr
from luthier.types import DataError, Row, RowError, RowKind

_HALF_PAIR = re.compile("[\ud800-\udfff]")
"""What a JSON escape can write and no text can hold: one half of a surrogate pair."""


def require_kind(attr: DatasetAttr, kind: RowKind, stage: str) -> None:
    """Raise DataError where a data set cannot give what `stage` learns from, saying what its description lacks."""
    columns, name = attr.columns, f"data set {attr.name!r}"
    if attr.ranking and kind in ("text", "conversation"):
        raise DataError(
            f"{name} holds preference pairs (ranking: true), which stage {stage!r} does not learn from"
        )
    if attr.ranking and (columns.chosen is None or columns.rejected is None):
        raise DataError(
            f"{name} holds preference pairs (ranking: true) and does not say where: name columns.chosen and "
            "columns.rejected"
        )
    if kind == "text" and (columns.images or columns.videos or columns.audios):
        raise DataError(
            f"{name} has columns of images, videos or audios, and stage {stage!r} learns text alone: leave them "
            "out of its description"
        )
    if kind == "pair" and not attr.ranking:
        raise DataError(
            f"{name} is not said to hold pairs of answers, which stage {stage!r} learns from: add ranking: true and "
            "name columns.chosen and columns.rejected"
        )
    if kind == "feedback" and not attr.ranking and columns.kto_tag is None:
        raise DataError(
            f"{name} has no labels, which stage {stage!r} learns from: name the column that says whether an answer "
            "is desirable in columns.kto_tag"
        )


def to_row(raw: RawRow, attr: DatasetAttr, kind: RowKind) -> Row:
    """A raw row in the format `attr.formatting`; `kind` says what the stage learns from.

    Of a data set of pairs, rows of kind `feedback` are pairs, too: one answer desirable, the other not. A row of kind
    `prompt` ends with its answer where it has one, the better one of a pair.
    """
    if kind == "text":
        row = Row(attr.name, raw.index, text=_text(raw, attr))
    elif kind == "pair" or (kind == "feedback" and attr.ranking):
        chosen, rejected = pair(raw, attr)
        row = Row(attr.name, raw.index, chosen, rejected=rejected, margin=margin_of(raw, attr))
    elif kind == "feedback":
        row = Row(attr.name, raw.index, answered(raw, attr), desirable=is_desirable(raw, attr))
    elif kind == "prompt":
        row = Row(attr.name, raw.index, pair(raw, attr)[0] if attr.ranking else posed(raw, attr))
    else:
        row = Row(attr.name, raw.index, answered(raw, attr))
    row = _with_media(row, raw, attr)
    if any(not text.isascii() and _HALF_PAIR.search(text) for text in _texts(row)):
        raise RowError("text holds half of a surrogate pair", raw.place)
    return row


def _with_media(row: Row, raw: RawRow, attr: DatasetAttr) -> Row:
    if row.text is not None:
        return row
    both = (c if c is None else with_media(c, raw, attr) for c in (row.conversation, row.rejected))
    conversation, rejected = both
    if conversation is row.conversation and rejected is row.rejected:
        return row
    return replace(row, conversation=conversation, rejected=rejected)


def _texts(row: Row) -> Iterator[str]:
    yield row.text or ""
    for conversation in (row.conversation, row.rejected):
        if conversation is None:
            continue
        if conversation.tools:
            yield json.dumps(conversation.tools, ensure_ascii=False, default=str)
        for message in conversation.messages:
            yield message.content
            yield message.reasoning or ""
            for call in message.tool_calls:
                yield call.name + json.dumps(call.arguments, ensure_ascii=False, default=str)


def _text(raw: RawRow, attr: DatasetAttr) -> str:
    """The first message's text: the prompt column, or the first user turn of a conversation.

    Raises DataError where that holds media, which `require_kind` cannot know of: they stand in the message itself.
    """
    if attr.formatting != "alpaca":
        messages = history(raw, attr).messages
        first = next((m for m in messages if m.role != "system"), None)
        if first is None:
            raise RowError("no message")
        if first.media:
            raise DataError(
                f"{raw.place}: it holds images, films or sounds, and text alone is learnt from it (stage 'pt'); use "
                "stage 'sft', or leave them out"
            )
        return first.content
    column = attr.columns.prompt
    if column not in raw.columns and "prompt" not in attr.named and "text" in raw.columns:
        column = "text"
    if column is None:
        raise DataError(f"{raw.place}: columns.prompt should name the column of the text")
    parts = [cell(raw, column, required=True), cell(raw, attr.columns.query)]
    return "\n".join(part for part in parts if part)
