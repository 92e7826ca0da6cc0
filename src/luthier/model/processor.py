"""The files of a model's processor: how it turns images, films and sounds into tensors.

A trained model is served with the processor that it was trained with, so its files go into every folder that is saved,
as they are but for what the recipe changed: the classes that read them may want libraries (torchvision) that training
on images does without.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def processor_files(path: str, hub: Mapping[str, Any]) -> dict[str, bytes]:
    """The processor's files in a folder, or of a hub name with these arguments, by name.

    Without a chat template: that of the tokenizer is saved beside them, and is the one that was trained.
    """
    found = {}
    for name in PROCESSOR_FILES:
        file = cached_file(path, name, _raise_exceptions_for_missing_entries=False, **_known(hub))
        if file is not None:
            found[name] = _without_template(Path(file).read_bytes())
    return found


def _known(hub: Mapping[str, Any]) -> dict[str, Any]:
    return {name: hub[name] for name in ("revision", "cache_dir", "token") if name in hub}


def _without_template(content: bytes) -> bytes:
    values = json.loads(content)
    if "chat_template" not in values:
        return content
    del values["chat_template"]
    return (json.dumps(values, indent=2) + "\n").encode()


def with_settings(files: Mapping[str, bytes], settings: Mapping[str, Mapping[str, Any]]) -> dict[str, bytes]:
    """The files with other values in them: {"image_processor": {"size": ...}, "video_processor": {}}, say.

    A part that is named gets a file of its own where it would read the images' one.
    """
    values: dict[str, dict[str, Any]] = {name: json.loads(content) for name, content in files.items()}
    whole, images = values.get(PROCESSOR_FILES[0], {}), values.get(PROCESSOR_FILES[1])
    if "video_processor" in settings and "video_processor" not in whole and images is not None:
        values.setdefault(PROCESSOR_FILES[2], dict(images))
    for part, name in (("image_processor", PROCESSOR_FILES[1]), ("video_processor", PROCESSOR_FILES[2])):
        for place in (values.get(name), whole.get(part)):
            if place is not None and settings.get(part):
                place.update(settings[part])
                if "size" in settings[part]:  # under their earlier names they would win
                    place.pop("min_pixels", None)
                    place.pop("max_pixels", None)
    return {
        name: files[name]
        if name in files and json.loads(files[name]) == value
        else (json.dumps(value, indent=2) + "\n").encode()
        for name, value in values.items()
    }


def set_processor(model: PreTrainedModel | PeftModel, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Have the processor's files written with the values that training uses, as `with_settings` says."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if files := getattr(inner, "luthier_processor", None):
        inner.luthier_processor = with_settings(files, settings)


def remember_processor(model: PreTrainedModel, files: Mapping[str, bytes]) -> None:
    """Let `write_processor` find the files."""
    model.luthier_processor = dict(files)  # type: ignore[assignment]


def write_processor(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Put the processor's files beside the weights of a model, or of its adapter; nothing where it has none."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    files: Mapping[str, bytes] = getattr(inner, "luthier_processor", {})
    for name, content in files.items():
        (folder / name).write_bytes(content)
