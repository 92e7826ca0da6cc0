"""What of a model is quantized: which layers, how many weights they hold, what they take, what they compute with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from luthier.types import ModelError


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers whose weights are kept in fewer bits, by name."""
    return {name: module for name, module in model.named_modules() if is_quantized_layer(module)}


def is_quantized_layer(module: nn.Module) -> bool:
    """Whether this layer's own weights are kept in fewer bits, or as whole numbers."""
    return any(_is_quantized(parameter) for parameter in module.parameters(recurse=False)) or any(
        name in module._buffers for name in ("qweight", "codes", "weight_packed")
    )


def _is_quantized(parameter: Tensor) -> bool:
    return not parameter.is_floating_point() or _inner_tensors(parameter) is not None


def _inner_tensors(tensor: Tensor) -> list[Tensor] | None:
    """The tensors that a tensor of torchao's is made of; None for a plain one."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return None
    return [getattr(tensor, name) for name in flatten()[0]]


def plain_parts(tensor: Tensor) -> list[Tensor]:
    """The tensors with memory of their own that a tensor is made of: itself, but for those of torchao."""
    inner = _inner_tensors(tensor)
    return [tensor] if inner is None else inner


def num_weights(model: nn.Module) -> int:
    """How many weights a model has, tied ones once. Below 8 bits several of them share a byte of a parameter."""
    held: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            held[id(parameter)] = packed_weights(module, parameter)
    return sum(held.values())


def packed_weights(module: nn.Module, parameter: Tensor) -> int:
    """How many weights a parameter of `module` stands for."""
    if parameter is module._parameters.get("W_q"):
        return int(module.in_features * module.out_features)  # type: ignore[operator]
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())


def stored_tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, tied ones once, with what quantized layers keep beside them; those that are made of
    others are taken apart."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [beside for module in model.modules() for beside in (*_scales(module), *_loose_bias(module))]
    return [part for tensor in tensors for part in plain_parts(tensor)]


def stored_bytes(model: nn.Module) -> int:
    """Bytes of `stored_tensors`."""
    return sum(tensor.numel() * tensor.element_size() for tensor in stored_tensors(model))


def is_int8(module: nn.Module) -> bool:
    """Whether it is a layer of LLM.int8(), and not PEFT's around it, which has the same name."""
    return type(module._parameters.get("weight")).__name__ == "Int8Params"


def _scales(module: nn.Module) -> Iterator[Tensor]:
    """Scales and offsets that are neither parameters nor buffers."""
    for parameter in module.parameters(recurse=False):
        state = getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            if part is not None:
                yield part.absmax
    if is_int8(module):  # with the weight until the first product, then with the layer
        held: list[Any] = [getattr(holder, "SCB", None) for holder in (module.state, module.weight)]
        yield from [scales for scales in held if scales is not None][:1]
    for value in getattr(module, "meta", {}).values() if hasattr(module, "W_q") else ():
        if isinstance(value, Tensor):
            yield value


def _loose_bias(module: nn.Module) -> list[Tensor]:
    """The bias of a layer of HQQ's, which is no parameter."""
    bias = getattr(module, "bias", None) if hasattr(module, "W_q") else None
    return [bias] if isinstance(bias, Tensor) and not isinstance(bias, nn.Parameter) else []


def arithmetic_types(model: nn.Module) -> set[torch.dtype]:
    """The types that quantized layers compute in, whatever the rest of the model does."""
    found: set[torch.dtype] = set()
    for module in quantized_layers(model).values():
        weight = getattr(module, "weight", None)
        on_gpu = isinstance(weight, Tensor) and weight.device.type != "cpu"
        if (is_int8(module) and on_gpu) or getattr(weight, "act_quant_kwargs", None) is not None:
            found.add(torch.float16)  # their inputs are rounded, to no more than its 11 bits
        elif isinstance(getattr(module, "compute_dtype", None), torch.dtype):
            found.add(module.compute_dtype)  # type: ignore[arg-type]
    return found


@dataclass(frozen=True, slots=True)
class Quantized:
    """What of a model is quantized: layers and their weights; all weights, and the bytes that they take."""

    layers: int
    weights: int
    total: int
    bytes: int


def measured(model: nn.Module) -> Quantized | None:
    """What of a model is quantized, an adapter counted with it; None where nothing is."""
    layers = quantized_layers(model).values()
    if not layers:
        return None
    within = sum(packed_weights(module, one) for module in layers for one in module.parameters(recurse=False))
    return Quantized(len(layers), within, num_weights(model), stored_bytes(model))


def looked_up(module: nn.Module) -> Tensor:
    """(O, I) the weights of a 4-bit layer of bitsandbytes, each found in its table of sixteen values (Dettmers et al.,
    2023, section 3), without its kernels but for the scales."""
    import bitsandbytes.functional

    weight: Any = module.weight
    state = weight.quant_state
    scales = state.absmax
    if state.nested:
        scales = bitsandbytes.functional.dequantize_blockwise(scales, state.state2) + state.offset
    packed = weight.data.view(torch.uint8).reshape(-1)
    values = state.code[torch.stack((packed >> 4, packed & 15), dim=-1).reshape(-1).long()]
    expanded = values * scales.float().repeat_interleave(state.blocksize)[: values.numel()]
    return expanded[: state.shape.numel()].reshape(state.shape).to(state.dtype)  # type: ignore[no-any-return]


def dequantized(module: nn.Module) -> Tensor:
    """(O, I) the weights that a quantized layer computes with, in plain numbers.

    Raises ModelError for a layer of files that were quantized elsewhere and have no such function.
    """
    weight: Any = getattr(module, "weight", None)
    if hasattr(module, "W_q"):
        return module.dequantize()  # type: ignore[operator, no-any-return]
    if getattr(weight, "quant_state", None) is not None:
        import bitsandbytes.functional

        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[no-any-return]
    if is_int8(module):
        scales: Any = next(_scales(module))
        return weight.data.float() * (scales[:, None] / 127.0)  # type: ignore[no-any-return]
    if _inner_tensors(weight) is not None:
        return weight.dequantize()  # type: ignore[no-any-return]
    raise ModelError(f"{type(module).__name__} does not tell its weights in plain numbers")
