"""The reference part of a recipe's stage: the model that answers are compared with."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from luthier.recipe.base import Spec
from luthier.recipe.quantization import QuantizationSpec


class ReferenceSpec(Spec):
    """The model that answers are compared with."""

    path: str | None = None
    """Another model; absent, what training starts from."""
    adapters: tuple[str, ...] = ()
    """Adapters on top of `path`, added into its weights."""
    quantization: QuantizationSpec | None = None
    """How the weights of `path` are kept; absent, as its files have them."""
    precompute: bool = False
    """Compute its log-probabilities once, keep them in the cache and free it."""

    @model_validator(mode="after")
    def _adapters_of_a_model(self) -> ReferenceSpec:
        if self.adapters and self.path is None:
            raise ValueError("adapters belong to a model: give reference.path too")
        if self.quantization is not None and self.path is None:
            raise ValueError(
                "quantization belongs to a model: give reference.path too; without one the reference is the model's "
                "own base (model.quantization)"
            )
        if self.quantization is not None and len(self.adapters) > 1:
            raise ValueError(
                "one adapter at most goes on a quantized reference: a second would be added into weights that were "
                "rounded"
            )
        return self


Reference = ReferenceSpec | Literal["start", "base", "precompute"]
"""`start` is the model as training starts from it, `base` the one below its adapters, `precompute` the first, in
advance."""


def is_precomputed(reference: Reference) -> bool:
    """Whether its log-probabilities are computed in advance."""
    return reference == "precompute" or (isinstance(reference, ReferenceSpec) and reference.precompute)
