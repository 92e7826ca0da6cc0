"""A quantized model -> the plain one whose weights its quantized ones stand for, in float32."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from luthier.model.quantized_layers import dequantized, quantized_layers
from luthier.types import ModelError

_MARKS = (
    "is_quantized",
    "quantization_method",
    "hf_quantizer",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
    "_pre_quantization_dtype",
)
"""What transformers leaves on a model that it quantized."""


def is_quantized(model: nn.Module) -> bool:
    """Whether weights of a model, or of the one inside its PEFT wrapper, are not plain numbers.

    Asked of the layers: torchao's and HQQ's leave no mark on the model.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return getattr(inner, "quantization_method", None) is not None or bool(quantized_layers(inner))


def dequantize(model: PreTrainedModel) -> PreTrainedModel:
    """The model with the plain weights that its quantized ones stand for, in float32; `model` is used up.

    Raises ModelError where the library of its quantization cannot say them.
    """
    conversions = _conversions(model)
    layers = quantized_layers(model)
    try:
        for name, layer in layers.items():
            model.set_submodule(name, _plain_layer(layer, dequantized(layer).detach().float()))
    except ModelError:  # files that were quantized elsewhere: their library may know
        model = _by_its_library(model)
    model._weight_conversions = conversions  # type: ignore[assignment]
    for name in _MARKS:
        model.__dict__.pop(name, None)
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    return cast_weights(model, torch.float32)  # type: ignore[no-any-return]


def cast_weights(model: Any, dtype: torch.dtype) -> Any:
    """The model with its parameters in `dtype`. Buffers stay: rotary frequencies are never 16-bit."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if hasattr(module, "luthier_dtype"):  # what a norm in float32 hands to 16-bit layers
            module.luthier_dtype = dtype
    return model


def _plain_layer(layer: nn.Module, weight_OI: Tensor) -> nn.Module:
    """The layer that was there before: linear, or GPT-2's with its matrix the other way round."""
    outputs, inputs = weight_OI.shape
    bias: Any = getattr(layer, "bias", None)
    transposed = getattr(layer, "source_cls", None) is Conv1D
    with torch.device("meta"):
        plain: Any = nn.Linear(inputs, outputs, bias=bias is not None)
        if transposed:
            plain = Conv1D(outputs, inputs)  # type: ignore[no-untyped-call]
    plain.weight = nn.Parameter(weight_OI.T.contiguous() if transposed else weight_OI, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().float(), requires_grad=False)
    elif transposed:
        plain.bias = nn.Parameter(weight_OI.new_zeros(outputs), requires_grad=False)
    assert isinstance(plain, nn.Module)
    return plain


def _by_its_library(model: PreTrainedModel) -> PreTrainedModel:
    method = getattr(model, "quantization_method", None)
    try:
        plain = model.dequantize(dtype=torch.float32)  # type: ignore[no-untyped-call]
    except (RuntimeError, AttributeError, ValueError) as error:
        raise ModelError(
            f"the base is quantized ({getattr(method, 'value', method)}), and its weights cannot be had back: {error}; "
            "name the base that is not quantized with --base"
        ) from error
    assert isinstance(plain, PreTrainedModel)
    return plain


def _conversions(model: PreTrainedModel) -> list[Any]:
    """How the model's files are written, but for how quantized weights were read: no way to write plain ones."""
    kept: list[Any] = list(getattr(model, "_weight_conversions", None) or ())
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return kept
    read = {tuple(one.source_patterns) for one in quantizer.get_weight_conversions()}
    return [one for one in kept if tuple(one.source_patterns) not in read]
