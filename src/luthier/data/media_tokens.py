"""A model's processor as data needs it: what stands for a medium in the text, and the numbers that the model sees.

    MediaReader(processor, rules)
        .expansion(media)             the text that takes the place of its placeholder
        (media, input_ids)            -> tensors, by the names of the model's forward

The expansion is the processor's own answer. It depends on the size of a medium alone, so the processor is asked with
an empty one of that size, once for each size: no file is decoded to count tokens.

Shape legend: T tokens of a flat row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from luthier.conversations import Media, MediaKind
from luthier.data.media_files import Extent, Film, MediaRules, measure, opened
from luthier.data.media_limits import Settings, limit_processor, nearest_settings
from luthier.recipe.media import MediaSpec
from luthier.types import DataError, ModelError, RowError

KINDS: tuple[MediaKind, ...] = ("image", "video", "audio")
_PARTS = {
    "image": ("image_processor",),
    "video": ("video_processor",),
    "audio": ("feature_extractor", "audio_processor"),
}
_NAMES = {"image": "images", "video": "videos", "audio": "audio"}
_OF_THE_TEXT = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "mm_token_type_ids",
    "text_replacement_offsets",
)
_REMEMBERED = 4096
"""Sizes of media whose expansions are kept."""
_INSTALL = {"video": ": transformers reads films with torchvision: pip install torchvision"}
TYPE_IDS = ("mm_token_type_ids", "token_type_ids")


class MediaReader:
    """Opens media and asks the model's processor about them; can be sent to other processes.

    The processor is given the recipe's limits of pixels; `settings` are those that its files are saved with. Raises
    ModelError for a processor that does not say how its media stand in a text, RecipeError as `limit_processor` does.
    """

    def __init__(self, processor: ProcessorMixin, spec: MediaSpec, *, llamafactory: bool = False) -> None:
        self.processor: Any = processor
        rate = getattr(self._part("audio"), "sampling_rate", None)
        if spec.audio_sampling_rate is None and rate is not None:
            spec = spec.model_copy(update={"audio_sampling_rate": rate})
        self.rules = MediaRules.of(spec, llamafactory=llamafactory)
        self.settings: Settings = (
            nearest_settings(processor, {"image": self.rules.image_pixels, "video": self.rules.video_pixels})
            if llamafactory
            else limit_processor(processor, spec)
        )
        chosen = {"do_pan_and_scan": spec.pan_and_scan, "crop_to_patches": spec.crop_to_patches}
        self._options = {name: value for name, value in chosen.items() if value is not None}
        self.placeholders: dict[str, str] = {
            kind: str(token)
            for kind in KINDS
            if (token := getattr(processor, f"{kind}_token", None)) is not None
        }
        if not self.placeholders:
            raise ModelError(
                f"{type(processor).__name__} does not say which token stands for an image; this model's media "
                "cannot be trained yet"
            )
        self._expansions: dict[Extent, str] = {}
        self._alone = Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_alone"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._alone = Lock()

    def _part(self, kind: str) -> Any:
        return next((part for name in _PARTS[kind] if (part := getattr(self.processor, name, None))), None)

    def takes(self, kind: str) -> bool:
        return kind in self.placeholders and self._part(kind) is not None

    def require(self, kind: MediaKind) -> None:
        """Raise DataError where the model, or what is installed, does not take media of this kind."""
        if not self.takes(kind):
            raise DataError(
                f"there are {kind}s, and {type(self.processor).__name__} takes none here{_INSTALL.get(kind, '')}"
            )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what decides tokens and numbers: the processor, the limits, the library."""
        parts = [self.processor.to_json_string(), repr(self.rules), self._options, transformers.__version__]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def expansion(self, media: Media) -> str:
        """What replaces the placeholder. Raises RowError for a file that cannot be used."""
        self.require(media.kind)
        extent = measure(media, self.rules)
        if extent not in self._expansions:
            if len(self._expansions) >= _REMEMBERED:
                self._expansions.clear()
            try:
                self._expansions[extent] = self._asked(media.kind, _empty(extent))
            except ValueError as error:
                raise RowError(
                    f"the model's processor refuses the {media.kind}", f"{media.source}: {error}"
                ) from error
        return self._expansions[extent]

    def _asked(self, kind: MediaKind, medium: Any) -> str:
        token = self.placeholders[kind]
        found = self._call([kind], [medium], return_text_replacement_offsets=True)
        if "text_replacement_offsets" in found:
            return str(found["text_replacement_offsets"][0][0]["replacement"])
        # a processor of the older form gives tokens alone
        ids = np.asarray(found["input_ids"][0]).tolist()
        text = str(
            self.processor.tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )
        if self.processor.tokenizer(text, add_special_tokens=False)["input_ids"] != ids:
            raise ModelError(
                f"{type(self.processor).__name__} does not say what takes the place of {token!r} in a text"
            )
        return text

    def process(self, text: str, media: Sequence[Media]) -> Mapping[str, Any]:
        """The processor's own call on a rendered text with its media: what generation does."""
        return self._call([one.kind for one in media], [opened(one, self.rules) for one in media], text)

    def _call(
        self, kinds: Sequence[str], media: Sequence[Any], text: str | None = None, **options: Any
    ) -> Mapping[str, Any]:
        """The processor on some media with a text, or with one of nothing but their placeholders."""
        given: dict[str, Any] = {}
        for kind in dict.fromkeys(kinds):
            given[_NAMES[kind]] = [one for k, one in zip(kinds, media, strict=True) if k == kind]
        if films := given.get("videos"):
            given["videos"] = [film.frames for film in films]
            options |= {"do_sample_frames": False, "video_metadata": [_metadata(film) for film in films]}
        if "audio" in given:
            options["sampling_rate"] = self.rules.audio_sampling_rate
        if "images" in given:
            options |= self._options
        text = "".join(self.placeholders[kind] for kind in kinds) if text is None else text
        with self._alone:  # while a server's engine opens images, prompts are counted beside it
            found: Mapping[str, Any] = self.processor(
                text=[text], add_special_tokens=False, **given, **options
            )
        return found

    def __call__(self, media: Sequence[Media], input_ids: Tensor) -> dict[str, Tensor]:
        """Numbers of some media in the order of their tokens, and types of the tokens where the model asks for them.

        input_ids (1, T); the types are (1, T), 0 for text, 1 for images, 2 for films, 3 for sounds. Raises RowError
        for a file that has gone since it was counted.
        """
        found = {}
        if media:
            made = self._call(
                [one.kind for one in media], [opened(one, self.rules) for one in media], return_tensors="pt"
            )
            if self._standing(made["input_ids"]) != self._standing(input_ids):
                raise RowError("a file has another size than when its tokens were counted")
            found = {
                name: value
                for name, value in made.items()
                if name not in _OF_THE_TEXT and isinstance(value, Tensor)
            }
        if (name := self._type_name()) is not None:
            found[name] = torch.tensor(self.processor.create_mm_token_type_ids(input_ids.tolist()))
        return found

    def _standing(self, input_ids: Tensor) -> int:
        return int(torch.isin(input_ids, torch.tensor(sorted(self.token_ids()))).sum())

    def _type_name(self) -> str | None:
        """What the model calls the types of its tokens; None where it wants none."""
        if not getattr(self.processor, "return_mm_token_type_ids", False):
            return None
        names = self.processor.model_input_names
        return next((name for name in TYPE_IDS if name in names), None)

    def token_ids(self) -> frozenset[int]:
        """Ids of the tokens that stand for media."""
        found: set[int] = set()
        for kind, token in self.placeholders.items():
            ids = [index for index in getattr(self.processor, f"{kind}_token_ids", ()) if index is not None]
            found.update(map(int, ids or [self.processor.tokenizer.convert_tokens_to_ids(token)]))
        return frozenset(found)


def _empty(extent: Extent) -> Any:
    if extent.kind == "audio":
        return np.zeros(extent.samples, np.float32)
    image = Image.new("RGB", (extent.width, extent.height))
    return Film([image] * extent.frames, extent.fps) if extent.kind == "video" else image


def _metadata(film: Film) -> dict[str, Any]:
    count = len(film.frames)
    return {
        "total_num_frames": count,
        "fps": film.fps,
        "duration": count / film.fps,
        "frames_indices": list(range(count)),
        "width": film.frames[0].width,
        "height": film.frames[0].height,
    }
