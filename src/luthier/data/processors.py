"""A model's own `ProcessorMixin`, and what of it works on this machine.

transformers reads films with torchvision alone. Where that is missing, a processor that takes films too is built
without its video part, so that images train all the same; a row with a film is then refused by `media_tokens`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import transformers
from transformers import PROCESSOR_MAPPING, AutoProcessor, PreTrainedConfig, ProcessorMixin
from transformers.utils.hub import cached_file
from transformers.utils.import_utils import is_torchvision_available

from luthier.types import ModelError

VIDEO_PART = "video_processor"
_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_WHERE = ("revision", "cache_dir", "token")


def load_processor(path: str, hub: Mapping[str, Any], config: PreTrainedConfig) -> ProcessorMixin | None:
    """The processor of a model in a folder, or of a hub name with these arguments; None for one that reads text alone.

    Raises ModelError for one that cannot be loaded, saying what is missing.
    """
    if config.get_text_config() is config:
        return None
    found = {name: content for name in _FILES if (content := _read(path, name, hub)) is not None}
    if not found:
        return None
    named = next(
        (content["processor_class"] for content in found.values() if "processor_class" in content), None
    )
    if named is None and type(config) in PROCESSOR_MAPPING:
        mapped: Any = PROCESSOR_MAPPING[type(config)]
        named = mapped.__name__
    known = getattr(transformers, str(named), None)
    try:
        if known is None or any("AutoProcessor" in content.get("auto_map", ()) for content in found.values()):
            loaded: Any = AutoProcessor.from_pretrained(path, **hub)  # type: ignore[no-untyped-call]
        else:
            loaded = processor_class(known).from_pretrained(path, **hub)
    except (OSError, ValueError, TypeError, ImportError, AttributeError) as error:
        why = str(error).strip().partition("\n")[0][:200]
        raise ModelError(f"{path}: its processor {named} could not be loaded: {why}") from error
    return loaded if isinstance(loaded, ProcessorMixin) else None


def _read(path: str, name: str, hub: Mapping[str, Any]) -> dict[str, Any] | None:
    where = {key: hub[key] for key in _WHERE if key in hub}
    file = cached_file(path, name, _raise_exceptions_for_missing_entries=False, **where)
    if file is None:
        return None
    content: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8"))
    return content


def processor_class(processor: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The class itself, or one of the same name without the video part where torchvision is missing.

    Raises ModelError where the class cannot do without.
    """
    parts = [name for name in inspect.signature(processor.__init__).parameters if name != "self"]
    if VIDEO_PART not in parts or is_torchvision_available():
        return processor
    attributes: list[str] = processor.get_attributes()  # type: ignore[no-untyped-call]
    if attributes[-1] != VIDEO_PART:
        raise ModelError(
            f"{processor.__name__} needs torchvision, which is not installed: pip install torchvision"
        )

    def get_attributes(cls: type[ProcessorMixin]) -> list[str]:
        return attributes[:-1]

    def build(self: ProcessorMixin, *parts: Any, **options: Any) -> None:
        cast(Any, processor).__init__(self, *parts, **{VIDEO_PART: None, **options})

    def from_args_and_dict(cls: Any, args: Any, values: dict[str, Any], /, **options: Any) -> Any:
        # transformers passes on the template of a file only where the constructor names it
        made = cast(Any, processor).from_args_and_dict.__func__(cls, args, values, **options)
        whole = made[0] if isinstance(made, tuple) else made
        whole.chat_template = whole.chat_template or values.get("chat_template")
        return made

    # The name is kept: it is what is saved, and what loads it where torchvision is.
    members: dict[str, Any] = {
        "__init__": build,
        "get_attributes": classmethod(get_attributes),
        "from_args_and_dict": classmethod(from_args_and_dict),
        "__module__": processor.__module__,
        "__reduce__": _reduced,
    }
    return type(processor.__name__, (processor,), members)


def _reduced(processor: ProcessorMixin) -> tuple[Any, ...]:
    """How other processes get one: its class is found by name, and is the whole one there."""
    return _restored, (type(processor).__bases__[0], processor.__dict__)


def _restored(whole: type[ProcessorMixin], state: dict[str, Any]) -> ProcessorMixin:
    kind = processor_class(whole)
    processor = kind.__new__(kind)
    processor.__dict__.update(state)
    return processor
