"""The files of a model's processor: how it turns images, films and sounds into tensors.

A trained model is served with the processor that it was trained with, so its files go into every folder that is saved,
as they are: the classes that read them may want libraries (torchvision) that training on images does without.
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


def remember_processor(model: PreTrainedModel, files: Mapping[str, bytes]) -> None:
    """Let `write_processor` find the files."""
    model.luthier_processor = dict(files)  # type: ignore[assignment]


def write_processor(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Put the processor's files beside the weights of a model, or of its adapter; nothing where it has none."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    files: Mapping[str, bytes] = getattr(inner, "luthier_processor", {})
    for name, content in files.items():
        (folder / name).write_bytes(content)
