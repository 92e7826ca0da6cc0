"""Sizes and times of change of the media that a data set names, as a part of its tokens' key.

Which files its rows name depends on the data, so it is kept beside the tokenized cache: then a start reads no row to
find that no picture has changed. Where a name leads, and what lies there, is looked up anew each time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from luthier.data.media import Source, looked_up
from luthier.data.media_files import stamp
from luthier.files import write_whole


def media_stamps(index: Path, folder: Path, named: Callable[[], Iterable[Source]]) -> str:
    """SHA-256 of paths, sizes and times of change of the media that rows name, looked for in `folder`.

    `named` reads what they name, as they name it; it is asked only where the file `index` does not hold its answer.
    """
    digest = hashlib.sha256()
    for source in _indexed(index, named):
        found = looked_up(source, folder)
        digest.update(json.dumps([found, stamp(found)]).encode())
    return digest.hexdigest()


def _indexed(index: Path, named: Callable[[], Iterable[Source]]) -> list[Source]:
    with suppress(OSError, ValueError):
        known: list[Any] = json.loads(index.read_text(encoding="utf-8"))
        return [tuple(one) if isinstance(one, list) else one for one in known]
    # What a row holds itself, as a data: URL, is in the bytes of the data.
    sources = list(dict.fromkeys(source for source in named() if not _held(source)))
    with suppress(OSError):  # the cache itself says what is wrong with its folder
        index.parent.mkdir(parents=True, exist_ok=True)
        write_whole(index, json.dumps(sources, ensure_ascii=False))
    return sources


def _held(source: Source) -> bool:
    frames: Sequence[str] = (source,) if isinstance(source, str) else source
    return all(one.startswith("data:") for one in frames)
