"""Objects of requests whose every field is known: what is not is refused by name, and never read over in silence."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

_REFUSED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "logit_bias": ("logits cannot be biased here", ({},)),
    "functions": ("write tools instead", ([],)),
    "function_call": ("write tool_choice instead", ()),
    "parallel_tool_calls": ("the number of calls cannot be held to one", (True,)),
    "modalities": ("answers are text", (["text"],)),
    "audio": ("answers are text", ()),
    "prediction": ("there is no speculative decoding", ()),
    "web_search_options": ("nothing is searched", ()),
    "suffix": ("nothing is filled in between", ("",)),
    "echo": ("the prompt is not repeated", (False,)),
    "best_of": ("all answers are returned; use n", ()),
    "num_beams": ("beams are not searched here; `luthier predict` can", (1,)),
}
"""Known fields that are refused: why, and the values that ask for nothing and are read over."""


class Strict(BaseModel):
    """An object whose every field is known."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    ignored: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kept = {}
        for name, item in value.items():
            if name in cls.model_fields:
                kept[name] = item
                continue
            why, harmless = _REFUSED.get(name, ("", ()))
            if name in cls.ignored or item is None or (why and item in harmless):
                continue
            if why:
                raise PydanticCustomError(
                    "refused", "the field {field} is not supported: {why}", {"field": name, "why": why}
                )
            raise PydanticCustomError("unknown", "the field {field} is not known here", {"field": name[:80]})
        return kept
