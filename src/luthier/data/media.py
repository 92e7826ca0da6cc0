"""Images, films and sounds of a row -> `Media` in its messages.

    content_parts(content, place)        a message's content -> its text, and what stands in it
    with_media(conversation, raw, attr)  the columns images, videos and audios, put where the tags are

Tags are LLaMA-Factory's `<image>`, `<video>` and `<audio>`. They mean something only where the data set has a column
of that kind. Media without any tag come in front of the first user message. Paths are looked for in
`data.media.directory`, then as they are. Nothing is opened here, and nothing is ever fetched from the network.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from luthier.conversations import Media, MediaKind
from luthier.data.read import RawRow
from luthier.data.registry import DatasetAttr
from luthier.types import Conversation, Message, RowError

TAGS: dict[str, MediaKind] = {"<image>": "image", "<video>": "video", "<audio>": "audio"}
_TAG = re.compile("|".join(TAGS))
_WEB = re.compile(r"https?://", re.IGNORECASE)
_FORMATS = {"wav": "wav", "mp3": "mpeg"}

Source = str | tuple[str, ...]


def content_parts(content: Any, place: str) -> tuple[str, tuple[Media, ...]]:
    """Text, or OpenAI's list of parts: text, image, image_url, video, video_url, audio, audio_url, input_audio.

    A part of a kind without a source stands for the next entry of the row's column. Raises RowError for anything
    else; `place` names the message in it.
    """
    if isinstance(content, str):
        return content, ()
    if not isinstance(content, Sequence):
        raise RowError("content is not text", f"{place}: {type(content).__name__}")
    text, media = "", []
    for part in content:
        if isinstance(part, Mapping) and part.get("type") == "text":
            text += str(part.get("text") or "")
            continue
        kind, source = _part(part, place)
        media.append(Media(kind, source, len(text)))
    return text, tuple(media)


def _part(part: Any, place: str) -> tuple[MediaKind, Source]:
    named = str(part.get("type")) if isinstance(part, Mapping) else type(part).__name__
    if named == "input_audio" and isinstance(part.get(named), Mapping):
        sound = part[named]
        data, form = str(sound.get("data") or ""), str(sound.get("format") or "wav")
        # OpenAI's form holds the bytes; a path is what a local file has
        is_path = "." in data or not data
        return "audio", data if is_path else f"data:audio/{_FORMATS.get(form, form)};base64,{data}"
    kind = named.removesuffix("_url")
    if kind not in ("image", "video", "audio"):
        raise RowError("content is not text", f"{place}: a part of type {named!r}")
    found = next((part[key] for key in (named, "path", "url", kind) if part.get(key)), "")
    if isinstance(found, Mapping):
        found = found.get("url") or found
    return kind, _source(found, kind, place)  # type: ignore[arg-type, return-value]  # narrowed by the line above


def _source(value: Any, kind: MediaKind, place: str) -> Source:
    """A path, a data: URL, the bytes of a file as `datasets` keeps them, or the frames of a film."""
    if isinstance(value, Mapping):
        if value.get("bytes"):
            return f"data:{kind};base64,{base64.b64encode(value['bytes']).decode()}"
        value = value.get("path")
    if isinstance(value, str):
        if _WEB.match(value):
            raise RowError(
                f"{kind} is named by a web address, and nothing is fetched: download it and give its path",
                f"{place}: {value[:80]}",
            )
        return value.removeprefix("file://")
    if kind == "video" and isinstance(value, Sequence) and value:
        return tuple(str(_source(frame, "image", place)) for frame in value)
    raise RowError(f"{kind} is neither a path nor a data: URL", f"{place}: {type(value).__name__}")


def with_media(conversation: Conversation, raw: RawRow, attr: DatasetAttr) -> Conversation:
    """The conversation with the media of the row's columns, every path looked up.

    Without a media directory, paths stay as they are named. Raises RowError where a kind has tags, and not as many as
    its column has entries.
    """
    columns = attr.columns
    inline = any(message.media for message in conversation.messages)
    if not inline and columns.images is None and columns.videos is None and columns.audios is None:
        return conversation
    given = {kind: _given(raw, attr, kind) for kind in TAGS.values()}
    if not inline and all(sources is None for sources in given.values()):
        return conversation
    messages = [
        _untagged(m, [kind for kind, sources in given.items() if sources is not None])
        for m in conversation.messages
    ]
    for kind, sources in given.items():
        waiting = sum(1 for m in messages for one in m.media if one.kind == kind and not one.source)
        if sources and not waiting:
            messages = _in_front(messages, [Media(kind, source) for source in sources], raw)
        elif waiting != len(sources or ()):
            raise RowError(
                f"{kind}s of the row and their places in its text differ in number",
                f"{raw.place}: {len(sources or ())} for {waiting}",
            )
    waits = {kind: iter(sources or ()) for kind, sources in given.items()}
    folder = None if attr.media_directory is None else Path(attr.media_directory)
    filled = []
    for message in messages:
        media = [replace(one, source=one.source or next(waits[one.kind])) for one in message.media]
        found = tuple(
            media if folder is None else [replace(one, source=looked_up(one.source, folder)) for one in media]
        )
        filled.append(replace(message, media=found) if found else message)
    return replace(conversation, messages=tuple(filled))


def _given(raw: RawRow, attr: DatasetAttr, kind: MediaKind) -> list[Source] | None:
    """What the row's column of this kind holds; None where the data set has no such column."""
    column = getattr(attr.columns, f"{kind}s")
    if column is None:
        return None
    values = raw.columns.get(column)
    if values is None:
        return []
    if isinstance(values, str | Mapping):
        values = [values]
    if not isinstance(values, Sequence):
        raise RowError(f"{kind}s are not a list", f"{raw.place}, {column}: {type(values).__name__}")
    return [_source(value, kind, f"{raw.place}, {column}") for value in values]


def _untagged(message: Message, kinds: Sequence[MediaKind]) -> Message:
    """The message with its tags taken out of the text, and a place of its own for each."""
    tags = [
        (match.start(), match.end(), Media(TAGS[match.group()], ""))
        for match in _TAG.finditer(message.content)
        if TAGS[match.group()] in kinds
    ]
    if not tags:
        return message
    events = sorted([*tags, *((one.at, one.at, one) for one in message.media)], key=lambda event: event[0])
    text, last, media = "", 0, []
    for start, end, one in events:
        text += message.content[last:start]
        media.append(replace(one, at=len(text)))
        last = end

    def moved(position: int) -> int:
        return position - sum(min(end, position) - start for start, end, _ in tags if start < position)

    spans = tuple((moved(start), moved(stop), weight) for start, stop, weight in message.spans)
    return replace(message, content=text + message.content[last:], media=tuple(media), spans=spans)


def _in_front(messages: Sequence[Message], media: Sequence[Media], raw: RawRow) -> list[Message]:
    """The media at the beginning of the first user message, behind those that are there already."""
    first = next((k for k, message in enumerate(messages) if message.role == "user"), None)
    if first is None:
        raise RowError("no user message to put the media in front of", raw.place)
    there = messages[first].media
    behind = sum(1 for one in there if one.at == 0)
    joined = (*there[:behind], *media, *there[behind:])
    return [*messages[:first], replace(messages[first], media=joined), *messages[first + 1 :]]


def looked_up(source: Source, folder: Path) -> Source:
    """The absolute path of a file in the folder of media, or of one that is where its name says, or of no file."""
    if isinstance(source, tuple):
        return tuple(str(looked_up(frame, folder)) for frame in source)
    if source.startswith("data:"):
        return source
    inside = folder / source
    return str((Path(source) if not inside.exists() and Path(source).exists() else inside).absolute())
