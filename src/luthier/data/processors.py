"""A model's own `ProcessorMixin`, and what of it works on this machine.

transformers reads films with torchvision alone. Where that is missing, a processor that takes films too is built
without its video part, so that images train all the same; a row with a film is then refused by `media`.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import ProcessorMixin
from transformers.utils.import_utils import is_torchvision_available

from luthier.types import ModelError

VIDEO_PART = "video_processor"


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

    # The name is kept: it is what is saved, and what loads it where torchvision is.
    members: dict[str, Any] = {
        "get_attributes": classmethod(get_attributes),
        "__module__": processor.__module__,
    }
    return type(processor.__name__, (processor,), members)
