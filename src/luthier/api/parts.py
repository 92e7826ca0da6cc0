"""Parts of a message: text, and media as the bytes that a request brings. Nothing is ever fetched or opened by name.

Text, `image_url` and `video_url` with a data: URL, and `input_audio`. What they may be at most is looked at before
anything is decoded: a small file can hold an image that fills the memory.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Sequence
from typing import Any, Literal

from PIL import Image
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from luthier.api.strict import Strict
from luthier.types import Media, RowError

MAX_PIXELS = 50_000_000
"""Of one image. Decoded it takes three bytes for each."""

_KINDS = ("text", "image_url", "video_url", "input_audio")
_DATA = re.compile(r"data:[\w.+-]+/[\w.+-]+(;[\w.+=-]+)*;base64,")


class DataUrl(Strict):
    """`{"url": "data:image/png;base64,..."}`. The model's processor decides how large an image is shown."""

    url: str = ""
    detail: str | None = Field(default=None, exclude=True)

    @model_validator(mode="after")
    def _brings_bytes(self) -> DataUrl:
        if self.detail not in (None, "auto"):
            raise PydanticCustomError(
                "media", "detail can be auto alone: the model's processor decides the size"
            )
        if not _DATA.match(self.url[:256]):
            raise PydanticCustomError(
                "media",
                "nothing is fetched and no file is opened here: send the bytes, as data:image/png;base64,...",
            )
        return self


class Sound(Strict):
    """The bytes of a sound in base64."""

    data: str = ""
    format: str = "wav"

    @model_validator(mode="after")
    def _is_base64(self) -> Sound:
        if not self.data or self.format not in ("wav", "mp3"):
            raise PydanticCustomError("media", "a sound has data, and a format that is wav or mp3")
        try:
            base64.b64decode(self.data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise PydanticCustomError("media", "the data of a sound is base64") from error
        return self


class Part(Strict):
    """One part; it has the field that its type names, and no other."""

    type: Literal["text", "image_url", "video_url", "input_audio"]
    text: str | None = None
    image_url: DataUrl | None = None
    video_url: DataUrl | None = None
    input_audio: Sound | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_a_kind(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind not in _KINDS:
            raise PydanticCustomError(
                "media",
                "a part of type {kind} is not supported; there are {kinds}",
                {"kind": kind[:40], "kinds": ", ".join(_KINDS)},
            )
        return value

    @model_validator(mode="after")
    def _has_its_field(self) -> Part:
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if given != [self.type]:
            raise PydanticCustomError(
                "media", "a part of type {kind} has the field {kind} and no other", {"kind": self.type}
            )
        return self


def require_openable(media: Sequence[Media]) -> None:
    """Raise RowError for media that a request does not bring itself, and for an image that is larger than it may be."""
    for medium in media:
        sources = medium.source if isinstance(medium.source, tuple) else (medium.source,)
        if not all(source.startswith("data:") for source in sources):
            raise RowError(
                f"{medium.kind} is named and not sent", "nothing is fetched and no file is opened here"
            )
        if medium.kind == "image":
            _require_small(sources[0])


def _require_small(source: str) -> None:
    try:
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2], validate=True))) as image:
            small, size = image.width * image.height <= MAX_PIXELS, f"{image.width} x {image.height}"
    except Image.DecompressionBombError:
        small, size = False, "it says that it has many times as many"
    except (OSError, ValueError, SyntaxError):
        return  # what opens it for its tokens says what is wrong
    if not small:
        raise RowError(f"image is too large: at most {MAX_PIXELS:,} pixels are taken", size)
