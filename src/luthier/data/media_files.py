"""Files of media: whether they can be opened, how large they are, and what is in them.

    MediaRules.of(spec, llamafactory)   the recipe's limits
    measure(media, rules)               -> Extent, which decides how many tokens it has; the file is checked
    opened(media, rules)                -> what a processor takes

`measure` reads no more than it must, but enough that a file that passes can be opened in training: a JPEG file is
decoded at an eighth of its size, which finds one that is cut short.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from luthier.conversations import Media
from luthier.recipe.media import MediaSpec
from luthier.types import DataError, RowError

_IMAGE_FAULTS = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    ValueError,
    binascii.Error,
)
"""What PIL raises of a file that is not what it says."""
INSTALL = "pip install 'luthier[media]'"
_ORIENTATION = 0x0112
_REMEMBERED = 65536
_FEW = 8

Float32 = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class MediaRules:
    """How media are made smaller or larger before the model's processor sees them; None leaves them alone, which the
    recipes of our own do: `media_limits` tells the processor.

    `upright`: turn photographs as their camera says, as transformers does in generation and LLaMA-Factory does not.
    """

    image_pixels: tuple[int | None, int | None] = (None, None)
    video_pixels: tuple[int | None, int | None] = (None, None)
    video_fps: float = 2.0
    video_max_frames: int = 128
    audio_sampling_rate: int | None = None
    upright: bool = True

    @classmethod
    def of(cls, spec: MediaSpec, *, llamafactory: bool = False) -> MediaRules:
        """The recipe's; one translated from LLaMA-Factory has that tool's limits of pixels, kept as there."""
        plain = cls(
            video_fps=spec.video_fps,
            video_max_frames=spec.video_max_frames,
            audio_sampling_rate=spec.audio_sampling_rate,
        )
        if not llamafactory:
            return plain
        return replace(
            plain,
            image_pixels=(spec.image_min_pixels or 32 * 32, spec.image_max_pixels or 768 * 768),
            video_pixels=(spec.video_min_pixels or 16 * 16, spec.video_max_pixels or 256 * 256),
            audio_sampling_rate=spec.audio_sampling_rate or 16000,
            upright=False,
        )


@dataclass(frozen=True, slots=True)
class Extent:
    """What of a medium its number of tokens depends on: pixels, frames with their times, or samples of a sound."""

    kind: str
    width: int = 0
    height: int = 0
    frames: int = 0
    fps: float = 0.0
    samples: int = 0


@dataclass(frozen=True, slots=True)
class Film:
    """Frames of a film; `fps` is how many of them a second of it has."""

    frames: list[Image.Image]
    fps: float


def measure(media: Media, rules: MediaRules) -> Extent:
    """How large a medium is for the processor. Raises RowError for a file that is missing or cannot be opened."""
    if media.kind == "audio":
        return Extent("audio", samples=len(_sound(media.source, rules)))
    if media.kind == "image":
        width, height = _size(_only(media), rules)
        return Extent("image", *fitted_size(width, height, *rules.image_pixels))
    if isinstance(media.source, str):
        return _film_extent(media.source, rules, *_stamp(media.source))
    sizes = [_size(frame, rules) for frame in media.source]
    if len(set(sizes)) > 1:
        raise RowError("frames of a film differ in size", media.source[0])
    size = fitted_size(*sizes[0], *rules.video_pixels)
    return Extent("video", *size, frames=len(sizes), fps=rules.video_fps)


def opened(media: Media, rules: MediaRules) -> Image.Image | Film | Float32:
    """An image, the frames of a film, or the samples of a sound (n,) float32. Raises RowError as `measure` does."""
    if media.kind == "audio":
        return _sound(media.source, rules)
    if media.kind == "image":
        return _fitted(_read_image(_only(media), rules), rules.image_pixels)
    if isinstance(media.source, str):
        return _film(media.source, rules)
    frames = [_fitted(_read_image(frame, rules), rules.video_pixels) for frame in media.source]
    return Film(frames, rules.video_fps)


def fitted_size(width: int, height: int, least: int | None, most: int | None) -> tuple[int, int]:
    """The size after the limits, the shape kept as far as whole pixels allow (LLaMA-Factory's rounding)."""
    if most is not None and width * height > most:
        factor = math.sqrt(most / (width * height))
        width, height = int(width * factor), int(height * factor)
    if least is not None and width * height < least:
        factor = math.sqrt(least / max(width * height, 1))
        width, height = int(width * factor), int(height * factor)
    return max(width, 1), max(height, 1)


def _fitted(image: Image.Image, limits: tuple[int | None, int | None]) -> Image.Image:
    size = fitted_size(*image.size, *limits)
    return image if size == image.size else image.resize(size)


# --------------------------------------------------------------------------------------------------
# Images


@contextmanager
def _image(source: str) -> Iterator[Image.Image]:
    try:
        with Image.open(_stream(source)) as image:
            yield image
    except FileNotFoundError as error:
        raise RowError("image file is missing", source) from error
    except _IMAGE_FAULTS as error:
        raise RowError("image file is broken", f"{_shown(source)}: {error}") from error


def _size(source: str, rules: MediaRules) -> tuple[int, int]:
    look = _checked_bytes if source.startswith("data:") else _checked_size
    return look(source, rules.upright, *_stamp(source))


@lru_cache(_REMEMBERED)
def _checked_size(source: str, upright: bool, *stamp: int) -> tuple[int, int]:
    """Width and height; one look at a file that many rows name. `stamp` forgets a file that changed."""
    with _image(source) as image:
        width, height = image.size
        turned = upright and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
        if image.format == "JPEG":
            image.draft("L", (max(width // 8, 1), max(height // 8, 1)))
        image.load()
    return (height, width) if turned else (width, height)


_checked_bytes = lru_cache(_FEW)(_checked_size.__wrapped__)
"""The same of images that are whole in their source: so many that a prompt is made at once, and no more, are kept."""


def _read_image(source: str, rules: MediaRules) -> Image.Image:
    with _image(source) as image:
        turned = ImageOps.exif_transpose(image) if rules.upright else image
        return turned.convert("RGB")


def stamp(source: str | tuple[str, ...]) -> list[list[int]]:
    """Size in bytes and time of the last change (ns) of the files of a medium; zeros where one is missing."""
    sources = source if isinstance(source, tuple) else (source,)
    return [list(_stamp(one)) for one in sources]


def _stamp(source: str) -> tuple[int, int]:
    if source.startswith("data:"):
        return len(source), 0
    try:
        status = Path(source).stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _stream(source: str) -> Path | io.BytesIO:
    if not source.startswith("data:"):
        return Path(source)
    head, _, body = source.partition(",")
    return io.BytesIO(base64.b64decode(body, validate=True) if head.endswith(";base64") else body.encode())


def _only(media: Media) -> str:
    if isinstance(media.source, tuple):
        raise RowError("an image has one file", media.source[0])
    return media.source


def _shown(source: str) -> str:
    return source if len(source) < 200 else f"{source[:60]}..."


# --------------------------------------------------------------------------------------------------
# Films


@lru_cache(_REMEMBERED)
def _film_extent(source: str, rules: MediaRules, *stamp: int) -> Extent:
    """Of a film file, decoded once however many rows name it. `stamp` forgets a file that changed."""
    film = _film(source, rules)
    return Extent("video", *film.frames[0].size, frames=len(film.frames), fps=film.fps)


def _film(source: str, rules: MediaRules) -> Film:
    """Frames of a film file, evenly spaced from its first to its last one: `video_fps` of each second, at most
    `video_max_frames` and at least one, as LLaMA-Factory takes them. No others are kept in memory."""
    try:
        import av
    except ImportError as error:
        raise DataError(
            f"{_shown(source)}: film files need PyAV, which is not installed: {INSTALL}"
        ) from error
    try:
        with av.open(_opened(source)) as container:
            if not container.streams.video:
                raise ValueError("no film in it")
            stream = container.streams.video[0]
            total = stream.frames or _num_frames(source)
            seconds = _seconds(stream, total, rules)
            wanted = min(total, rules.video_max_frames, max(1, math.floor(seconds * rules.video_fps)))
            chosen = np.linspace(0, total - 1, wanted).astype(int).tolist()
            frames = _decoded_frames(container.decode(stream), frozenset(chosen))
    except FileNotFoundError as error:
        raise RowError("video file is missing", source) from error
    except (OSError, ValueError, LookupError, av.error.FFmpegError) as error:
        raise RowError("video file is broken", f"{_shown(source)}: {error}") from error
    if len(frames) < wanted or not wanted:
        raise RowError(
            "video file is broken", f"{_shown(source)}: it has fewer frames than the {total} that it names"
        )
    return Film([_fitted(frame, rules.video_pixels) for frame in frames], wanted / seconds)


def _num_frames(source: str) -> int:
    """Frames of a film whose header does not say how many it has: its packets are counted, not decoded."""
    import av

    with av.open(_opened(source)) as container:
        return sum(1 for packet in container.demux(video=0) if packet.size)


def _seconds(stream: Any, total: int, rules: MediaRules) -> float:
    """How long a film is, as it says itself; where it does not, by its frames."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return total / float(stream.average_rate or rules.video_fps)


def _decoded_frames(decoded: Iterator[Any], chosen: frozenset[int]) -> list[Image.Image]:
    last = max(chosen, default=-1)
    return [
        frame.to_image().convert("RGB")
        for index, frame in enumerate(islice(decoded, last + 1))
        if index in chosen
    ]


# --------------------------------------------------------------------------------------------------
# Sounds


def _sound(source: str | tuple[str, ...], rules: MediaRules) -> Float32:
    if isinstance(source, tuple):
        raise RowError("a sound has one file", source[0])
    rate = rules.audio_sampling_rate or 16000
    try:
        samples, found = _wave(source) if _is_wave(source) else _decoded(source)
    except FileNotFoundError as error:
        raise RowError("audio file is missing", source) from error
    except (wave.Error, EOFError, OSError, RuntimeError, ValueError) as error:
        raise RowError("audio file is broken", f"{_shown(source)}: {error}") from error
    if not len(samples):
        raise RowError("audio file is broken", f"{_shown(source)}: no sound in it")
    return samples if found == rate else _resampled(samples, found, rate, source)


def _is_wave(source: str) -> bool:
    """Whether it is the plain form (PCM of 16 bits) that Python reads by itself."""
    try:
        with wave.open(_opened(source)) as file:
            return bool(file.getsampwidth() == 2)
    except (wave.Error, EOFError):
        return False


def _opened(source: str) -> Any:
    stream = _stream(source)
    return stream if isinstance(stream, io.BytesIO) else str(stream)


def _wave(source: str) -> tuple[Float32, int]:
    with wave.open(_opened(source)) as file:
        data = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        samples = data.reshape(-1, file.getnchannels()).mean(axis=1) / 32768
        return samples.astype(np.float32), file.getframerate()


def _decoded(source: str) -> tuple[Float32, int]:
    try:
        import soundfile
    except ImportError as error:
        raise DataError(
            f"{_shown(source)}: sounds that are not 16-bit WAV files need soundfile, which is not installed: "
            f"{INSTALL}"
        ) from error
    samples, rate = soundfile.read(_opened(source), dtype="float32", always_2d=True)
    return samples.mean(axis=1), int(rate)


def _resampled(samples: Float32, found: int, rate: int, source: str) -> Float32:
    try:
        import soxr
    except ImportError as error:
        raise DataError(
            f"{_shown(source)}: it has {found} samples a second and the model wants {rate}, which needs soxr, which is "
            f"not installed: {INSTALL}"
        ) from error
    resampled: Float32 = soxr.resample(samples, found, rate)
    return resampled
