"""Training methods: which parameters may change, and how they are saved."""

from __future__ import annotations

from luthier.methods.full import Freeze, Full
from luthier.methods.lora import Lora
from luthier.model.vocabulary import VocabularyChange
from luthier.recipe.schema import FreezeSpec, FullSpec, LoraSpec

METHODS: dict[str, type[Full] | type[Lora]] = {"full": Full, "freeze": Freeze, "lora": Lora}


def build_method(
    spec: FullSpec | FreezeSpec | LoraSpec, vocabulary: VocabularyChange | None = None
) -> Full | Lora:
    """The method that a recipe's `method` part describes, for a model that was given these new tokens."""
    return METHODS[spec.type](spec, vocabulary or VocabularyChange())  # type: ignore[arg-type]


__all__ = ["METHODS", "build_method"]
