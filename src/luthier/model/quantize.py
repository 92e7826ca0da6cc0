"""Frozen weights in fewer bits: how a base is loaded so, and what of it is quantized.

Quantizers are those of the libraries (bitsandbytes, torchao, HQQ) and of transformers for files that are quantized
already. The weights themselves never train: adapters on them do (QLoRA, Dettmers et al., 2023, arXiv:2305.14314).
The output head and the embeddings stay plain.

Of `peft.prepare_model_for_kbit_training` this does what an adapter needs: everything frozen, normalisation in float32
(`model.norms`), and inputs with gradients under checkpointing, which the method switches on. It leaves out what that
adds, a float32 copy of the embeddings and the head: on a vocabulary of 128,256 with 4096 dimensions two gigabytes each
that change no result, because log-probabilities are computed in float32 from any head (`model.kernel`).
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from luthier.model.norms import upcast_norms
from luthier.recipe.schema import (
    BitsAndBytesSpec,
    FreezeSpec,
    FullSpec,
    HqqSpec,
    MethodSpec,
    QuantizationSpec,
)
from luthier.types import ModelError

TORCHAO_CONFIGS = {
    "int8_weight_only": "Int8WeightOnlyConfig",
    "int8_dynamic_activation_int8_weight": "Int8DynamicActivationInt8WeightConfig",
    "float8_weight_only": "Float8WeightOnlyConfig",
}
"""Classes of `torchao.quantization` by the names that `model.quantization.name` takes."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# --------------------------------------------------------------------------------------------------
# Files that are quantized already


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A way in which the files of a model can be quantized. `modules` are what loading imports, `install` brings them.

    tested: whether the project's own tests load and train it. dequantized: its quantized form has no backward pass, so
    transformers expands it while loading.
    """

    modules: tuple[str, ...] = ()
    install: str = ""
    tested: bool = False
    dequantized: bool = False


CHECKPOINTS = {
    "bitsandbytes": Checkpoint(("bitsandbytes",), "pip install 'luthier[bitsandbytes]'", tested=True),
    "torchao": Checkpoint(("torchao",), "pip install 'luthier[torchao]'"),
    "gptq": Checkpoint(("optimum", "gptqmodel"), "pip install optimum gptqmodel"),
    "awq": Checkpoint(("gptqmodel",), "pip install gptqmodel"),
    "aqlm": Checkpoint(("aqlm",), "pip install 'aqlm[gpu,cpu]'"),
    "compressed-tensors": Checkpoint(("compressed_tensors",), "pip install compressed-tensors"),
    "quanto": Checkpoint(("optimum.quanto",), "pip install optimum-quanto"),
    "fp8": Checkpoint(dequantized=True),
    "mxfp4": Checkpoint(dequantized=True),
}
"""By the `quant_method` of config.json."""


def checkpoint_method(config: PreTrainedConfig) -> str | None:
    """How a model's files are quantized, by the `quant_method` of its config.json; None where they are not."""
    described = getattr(config, "quantization_config", None)
    if described is None:
        return None
    fields = described if isinstance(described, dict) else described.to_dict()
    method = str(getattr(fields.get("quant_method"), "value", fields.get("quant_method")))
    return "bitsandbytes" if method.startswith("bitsandbytes") else method


def _checkpoint_arguments(method: str, label: str, device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained` for quantized files. Raises ModelError where they cannot be."""
    known = CHECKPOINTS.get(method)
    if known is None:
        raise ModelError(
            f"{label}: its files are quantized with {method}, which adapters cannot be trained on here; "
            f"choose one of {', '.join(CHECKPOINTS)}, or the plain model"
        )
    missing = [name for name in known.modules if not _is_installed(name)]
    if missing:
        raise ModelError(
            f"{label}: its files are quantized with {method}, and {missing[0]} is not installed: {known.install}"
        )
    arguments: dict[str, Any] = {"device_map": {"": device}}
    if known.dequantized:
        from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

        kind: Any = FineGrainedFP8Config if method == "fp8" else Mxfp4Config
        arguments["quantization_config"] = kind(dequantize=True)
    return arguments


def untested_files(model: nn.Module) -> str | None:
    """What to say of a base whose files are quantized in a way that no test of the project has trained on."""
    method = checkpoint_method(model.config)  # type: ignore[arg-type]
    if method is None or method not in CHECKPOINTS or CHECKPOINTS[method].tested:
        return None
    return f"the base's files are quantized with {method}: transformers loads them; no test here has trained on them"


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package
        return False


# --------------------------------------------------------------------------------------------------
# Quantizing while loading

INSTALL = {name: f"pip install 'luthier[{name}]'" for name in ("bitsandbytes", "torchao", "hqq")}
"""What installs the library of each kind of `QuantizationSpec`."""


def require_library(kind: str) -> None:
    """Raise ModelError, with the line that installs it, where the library of a kind of quantization is missing."""
    if not _is_installed(kind):
        raise ModelError(
            f"model.quantization.type={kind} needs the package {kind}, which is not installed: {INSTALL[kind]}"
        )


def loading_arguments(
    spec: QuantizationSpec | None,
    config: PreTrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    label: str,
    plain: Callable[[], nn.Module],
) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a base that is quantized while loading, or whose files are.

    dtype: of what is not quantized. plain: the model without weights, asked for the names of its heads. HQQ has none:
    `finish_quantization` does it all. Raises ModelError where a library is missing, or the files are quantized and the
    recipe asks for it too.
    """
    method = checkpoint_method(config)
    if method is not None:
        if spec is not None:
            raise ModelError(
                f"{label}: its files are quantized already ({method}); leave model.quantization out"
            )
        return _checkpoint_arguments(method, label, device)
    if spec is None:
        return {}
    require_library(spec.type)
    if isinstance(spec, HqqSpec):
        return {}
    skipped = [*spec.skip_modules, *_heads(plain())] if spec.skip_modules else None
    if isinstance(spec, BitsAndBytesSpec):
        chosen: Any = bitsandbytes_config(spec, dtype, skipped)
    else:
        import torchao.quantization
        from transformers import TorchAoConfig

        kind = getattr(torchao.quantization, TORCHAO_CONFIGS[spec.name])
        chosen = TorchAoConfig(quant_type=kind(), modules_to_not_convert=skipped)
    return {"quantization_config": chosen, "device_map": {"": device}}


def bitsandbytes_config(
    spec: BitsAndBytesSpec, dtype: torch.dtype, skipped: list[str] | None = None
) -> BitsAndBytesConfig:
    """transformers' form of the recipe's; `dtype` where the recipe leaves the type of the products open."""
    # Its 8-bit product says on every call that it rounds inputs to float16; docs/quantization.md says it once.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if spec.bits == 8:
        return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_8bit=True, llm_int8_threshold=spec.outlier_threshold, llm_int8_skip_modules=skipped
        )
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.quant_type,
        bnb_4bit_use_double_quant=spec.double,
        bnb_4bit_compute_dtype=DTYPES.get(spec.compute_dtype, dtype),
        llm_int8_skip_modules=skipped,
    )


def _heads(model: nn.Module) -> list[str]:
    """Names of what predicts: transformers leaves it plain by itself only where no other names are given."""
    getter: Any = getattr(model, "get_output_embeddings", None)
    outputs = {id(module) for module in (getter() if getter else None, getattr(model, "score", None))}
    return [name for name, module in model.named_modules() if id(module) in outputs]


def finish_quantization(
    model: PreTrainedModel, spec: QuantizationSpec | None, device: torch.device, label: str
) -> None:
    """What is left to do once the weights are there; the model is on `device`.

    Raises ModelError where nothing was quantized, or a layer does not take the groups.
    """
    if isinstance(spec, HqqSpec):
        _to_hqq(model, spec, device, label)
    layers = quantized_layers(model)
    if spec is not None and not layers:
        raise ModelError(f"{label}: model.quantization quantized none of its linear layers")
    if not layers:
        return
    for module in layers.values():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # In evaluation bitsandbytes would repack the weights for this CPU's bfloat16 kernel, for good: scales
            # rounded, no backward pass. What is evaluated has to be what trains.
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    model.requires_grad_(False)
    upcast_norms(model)


def _to_hqq(model: PreTrainedModel, spec: HqqSpec, device: torch.device, label: str) -> None:
    """Replace every linear layer but the heads. transformers 5.23 cannot: its HqqConfig raises NotImplementedError."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    # A linear layer by class as well, so that it is found wherever linear layers are looked for. `forward` is HQQ's;
    # who asks such a layer for its weight wants to know a device and a type.
    kind = type(
        "HQQLinear",
        (HQQLinear, nn.Linear),
        {"__module__": HQQLinear.__module__, "weight": property(lambda layer: layer.W_q)},
    )
    skipped = {*_heads(model), *spec.skip_modules}
    compute = DTYPES.get(spec.compute_dtype, model.dtype)
    for name, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear or any(name == one or name.endswith(f".{one}") for one in skipped):
            continue
        size = layer.in_features if spec.axis == 1 else layer.out_features
        if size % spec.group_size:
            raise ModelError(
                f"{label}: model.quantization.group_size={spec.group_size} does not divide the {size} "
                f"{'inputs' if spec.axis == 1 else 'outputs'} of {name}"
            )
        how = BaseQuantizeConfig(nbits=spec.bits, group_size=spec.group_size, axis=spec.axis)
        quantized = HQQLinear(layer, how, compute_dtype=compute, device=str(device), del_orig=True)
        quantized.__class__ = kind
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, quantized)
    model.is_quantized = True  # type: ignore[assignment]
    model.hqq_quantized = True  # type: ignore[assignment]


# --------------------------------------------------------------------------------------------------
# What of a model is quantized


def require_adapter_method(model: nn.Module, method: MethodSpec, label: str) -> None:
    """Raise ModelError where a method would train, copy or add to weights that are rounded: the recipe cannot tell
    files that are quantized already."""
    layers = quantized_layers(model)
    if not layers:
        return
    if isinstance(method, FullSpec | FreezeSpec):
        raise ModelError(
            f"{label} is quantized, and rounded weights cannot train, which method.type={method.type} asks for; give "
            "method.type=lora, or the plain model"
        )
    if getattr(method, "create_new_adapter", False) or len(getattr(method, "adapters", ())) > 1:
        raise ModelError(
            f"{label} is quantized, and adding an adapter into rounded weights would round them anew; name one adapter "
            "in method.adapters and go on with it"
        )
    for saved in getattr(method, "modules_to_save", None) or ():
        if any(name == saved or name.endswith(f".{saved}") for name in layers):
            raise ModelError(
                f"method.modules_to_save: {saved} is quantized and cannot train; name it in "
                "model.quantization.skip_modules too"
            )


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


def stored_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, tied ones once, with the scales that quantized layers keep beside them."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [scale for module in model.modules() for scale in _scales(module)]
    return sum(
        part.numel() * part.element_size()
        for tensor in tensors
        for part in (_inner_tensors(tensor) or [tensor])
    )


def _is_int8(module: nn.Module) -> bool:
    """Whether it is a layer of LLM.int8(), and not PEFT's around it, which has the same name."""
    return type(module._parameters.get("weight")).__name__ == "Int8Params"


def _scales(module: nn.Module) -> Iterator[Tensor]:
    """Scales and offsets that are neither parameters nor buffers."""
    for parameter in module.parameters(recurse=False):
        state = getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            if part is not None:
                yield part.absmax
    if _is_int8(module):  # with the weight until the first product, then with the layer
        held: list[Any] = [getattr(holder, "SCB", None) for holder in (module.state, module.weight)]
        yield from [scales for scales in held if scales is not None][:1]
    for value in getattr(module, "meta", {}).values() if hasattr(module, "W_q") else ():
        if isinstance(value, Tensor):
            yield value


def arithmetic_types(model: nn.Module) -> set[torch.dtype]:
    """The types that quantized layers compute in, whatever the rest of the model does."""
    found: set[torch.dtype] = set()
    for module in quantized_layers(model).values():
        weight = getattr(module, "weight", None)
        if _is_int8(module) or "act_quant_kwargs" in dir(weight):
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
    if _is_int8(module):
        scales: Any = next(_scales(module))
        return weight.data.float() * (scales[:, None] / 127.0)  # type: ignore[no-any-return]
    if _inner_tensors(weight) is not None:
        return weight.dequantize()  # type: ignore[no-any-return]
    raise ModelError(f"{type(module).__name__} does not tell its weights in plain numbers")
