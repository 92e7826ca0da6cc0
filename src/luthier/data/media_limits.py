"""Limits of pixels, said in the words of a model's own processor.

    limit_processor(processor, spec)   -> settings that its files are saved with

A processor whose `size` is the least and the most area of an image (Qwen2-VL's and its kin) resizes to the recipe's
limits by itself, and so does whoever loads the saved one. Shrinking images before it sees them would be known to nobody
who loads it; and what it made of the smaller image would be other pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from transformers import ProcessorMixin

from luthier.recipe.media import MediaSpec
from luthier.types import RecipeError

PARTS = {"image": "image_processor", "video": "video_processor"}
_GRIDS = {"image": "image_grid_thw", "video": "video_grid_thw"}
_LEAST, _MOST = "shortest_edge", "longest_edge"
"""What transformers calls the least and the most area, in pixels (formerly min_pixels and max_pixels)."""
_PROBES = ((1, 1), (9, 9), (3, 11))
"""Widths and heights of images that are tried, in tokens; the limits tried are 4 and 16 tokens."""

Settings = dict[str, dict[str, Any]]
"""Values by their key, by the part of the processor."""


def limit_processor(processor: ProcessorMixin, spec: MediaSpec) -> Settings:
    """Set the recipe's limits on the processor, whose own hold too; returns what to write into its files.

    Raises RecipeError where a part resizes by another rule, so that its files cannot say an area, or where nothing
    is left between its own limits and the recipe's.
    """
    settings: Settings = {}
    for kind, name in PARTS.items():
        least, most = getattr(spec, f"{kind}_min_pixels"), getattr(spec, f"{kind}_max_pixels")
        part: Any = getattr(processor, name, None)
        if part is None or (least is None and most is None):
            continue
        key = f"data.media.{kind}_{'max' if most is not None else 'min'}_pixels"
        if not takes_areas(part, kind):
            raise RecipeError(
                f"{key}: {type(part).__name__} resizes by a rule of its own, and its saved files cannot say an area, "
                "so the model would be served other pixels than it was trained on; remove the key, or make the files "
                "smaller"
            )
        own = part.size
        size = {_LEAST: max(least or 0, own[_LEAST]), _MOST: min(most or own[_MOST], own[_MOST])}
        if size[_LEAST] > size[_MOST]:
            raise RecipeError(
                f"{key}: the model's {type(part).__name__} allows {own[_LEAST]} to {own[_MOST]} pixels, which leaves "
                f"nothing between {least or 'no least'} and {most or 'no most'}"
            )
        part.size = size
        settings[name] = {"size": size}
    return _with_video_part(settings, processor)


def nearest_settings(
    processor: ProcessorMixin, limits: Mapping[str, tuple[int | None, int | None]]
) -> Settings:
    """What files can say of limits that are kept before the processor sees a medium: the same areas where the part
    takes some, cut to its own limits; nothing else. The processor stays as it is."""
    settings: Settings = {}
    for kind, (least, most) in limits.items():
        part: Any = getattr(processor, PARTS[kind], None)
        if part is None or (least is None and most is None) or not takes_areas(part, kind):
            continue
        low, high = part.size[_LEAST], part.size[_MOST]
        size = {_LEAST: min(max(least or 0, low), high), _MOST: max(min(most or high, high), low)}
        settings[PARTS[kind]] = {"size": size}
    return _with_video_part(settings, processor)


def _with_video_part(settings: Settings, processor: ProcessorMixin) -> Settings:
    """Named even where nothing is said of it: without a file of its own it would read the images' new limits."""
    if settings and getattr(processor, "video_token", None) is not None:
        settings.setdefault(PARTS["video"], {})
    return settings


def takes_areas(part: Any, kind: str) -> bool:
    """Whether `size` of an image or video processor is the least and most area of an image, or of each frame.

    It is tried on empty media: other processors have the same keys for edges, or for the volume of a film.
    """
    size, patch = getattr(part, "size", None), getattr(part, "patch_size", None)
    if not isinstance(patch, int) or not size or size.get(_LEAST) is None or size.get(_MOST) is None:
        return False
    edge = patch * getattr(part, "merge_size", 1)
    limits = {_LEAST: 4 * edge * edge, _MOST: 16 * edge * edge}
    areas = []
    for width, height in _PROBES:
        empty = Image.new("RGB", (width * edge, height * edge))
        for frames in (2, 8) if kind == "video" else (1,):
            given: dict[str, Any] = (
                {"videos": [[empty] * frames], "do_sample_frames": False}
                if kind == "video"
                else {"images": [empty]}
            )
            try:
                grid = part(**given, size=limits)[_GRIDS[kind]]
            except (KeyError, ValueError, OSError):  # what a processor says of media that it does not take
                return False
            areas.append(int(np.asarray(grid)[0][1:].prod()) * patch * patch)
    return all(limits[_LEAST] <= area <= limits[_MOST] for area in areas)
