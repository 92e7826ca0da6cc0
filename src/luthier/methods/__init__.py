"""Training methods: which parameters may change, and how they are saved."""

from __future__ import annotations

from typing import Any

from luthier.methods.full import Freeze, Full
from luthier.methods.llama_pro import LlamaPro
from luthier.methods.lora import Lora
from luthier.methods.tuners import Tuner
from luthier.model.vocabulary import VocabularyChange
from luthier.recipe.schema import MethodSpec

METHODS: dict[str, type[Full] | type[Lora] | type[Tuner]] = {
    "full": Full,
    "freeze": Freeze,
    "llama_pro": LlamaPro,
    "lora": Lora,
    "oft": Tuner,
    "vera": Tuner,
    "ia3": Tuner,
    "miss": Tuner,
    "peft": Tuner,
}


def build_method(spec: MethodSpec, vocabulary: VocabularyChange | None = None) -> Any:
    """The method that a recipe's `method` part describes, for a model that was given these new tokens.

    Raises RecipeError for an adapter that PEFT does not know, or not with these fields.
    """
    return METHODS[spec.type](spec, vocabulary or VocabularyChange())  # type: ignore[arg-type]


__all__ = ["METHODS", "build_method"]
