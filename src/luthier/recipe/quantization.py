"""The `quantization` of a model in a recipe: how the frozen weights below an adapter are kept in fewer bits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from luthier.recipe.base import Spec

ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]
"""`auto` is the type of `train.precision`."""


class BitsAndBytesSpec(Spec):
    """bitsandbytes: 4 bits (Dettmers et al., 2023, arXiv:2305.14314) or 8 (Dettmers et al., 2022, arXiv:2208.07339)."""

    type: Literal["bitsandbytes"] = "bitsandbytes"
    bits: Literal[4, 8] = 4
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """Of 4 bits: the sixteen values. nf4 are quantiles of a normal distribution, which weights resemble."""
    double: bool = True
    """Of 4 bits: quantize the scales too; saves 0.37 bits for each weight."""
    compute_dtype: ComputeDtype = "auto"
    """Of 4 bits: the type that weights are expanded to for the product."""
    outlier_threshold: float = Field(default=6.0, ge=0)
    """Of 8 bits: columns with an input above this are computed in float16; 0 computes all in int8."""
    skip_modules: tuple[str, ...] = ()
    """Names of modules that stay as they are, beside the output head and the embeddings."""

    @model_validator(mode="after")
    def _fields_of_these_bits(self) -> BitsAndBytesSpec:
        of_4, of_8 = ("quant_type", "double", "compute_dtype"), ("outlier_threshold",)
        fields = type(self).model_fields
        for name in of_4 if self.bits == 8 else of_8:
            if getattr(self, name) != fields[name].default:
                raise ValueError(
                    f"{name} belongs to bits: {12 - self.bits}, not to {self.bits}; leave it out"
                )
        return self


class TorchaoSpec(Spec):
    """torchao: 8 bits, in torch alone."""

    type: Literal["torchao"] = "torchao"
    name: Literal["int8_weight_only", "float8_weight_only"] = "int8_weight_only"
    """Its name there. Those that round inputs too have no backward pass."""
    skip_modules: tuple[str, ...] = ()
    """Names of modules that stay as they are, beside the output head and the embeddings."""


class HqqSpec(Spec):
    """Half-quadratic quantization (Badri and Shaji, 2023): groups of weights, without calibration data."""

    type: Literal["hqq"] = "hqq"
    bits: Literal[8, 6, 5, 4, 3, 2, 1] = 4
    group_size: int = Field(default=64, gt=0, multiple_of=8)
    """Weights that share a scale and a zero point."""
    axis: Literal[0, 1] = 1
    """Whether groups run over outputs (0) or inputs (1, more exact)."""
    compute_dtype: ComputeDtype = "auto"
    """The type that weights are expanded to for the product."""
    skip_modules: tuple[str, ...] = ()
    """Names of modules that stay as they are, beside the output head and the embeddings."""


QuantizationSpec = Annotated[BitsAndBytesSpec | TorchaoSpec | HqqSpec, Field(discriminator="type")]
