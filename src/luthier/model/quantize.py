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

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from luthier.model.norms import upcast_norms
from luthier.model.quantization_support import CHECKPOINTS, INSTALL, is_installed, quiet
from luthier.model.quantized_layers import dequantized, is_int8, looked_up, quantized_layers
from luthier.recipe.schema import (
    AdapterSpec,
    BitsAndBytesSpec,
    HqqSpec,
    MethodSpec,
    QuantizationSpec,
)
from luthier.types import ModelError

TORCHAO_CONFIGS = {
    "int8_weight_only": "Int8WeightOnlyConfig",
    "float8_weight_only": "Float8WeightOnlyConfig",
}
"""Classes of `torchao.quantization` by the names that `model.quantization.name` takes."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# --------------------------------------------------------------------------------------------------
# Files that are quantized already


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
    missing = [name for name in known.modules if not is_installed(name)]
    if missing:
        raise ModelError(
            f"{label}: its files are quantized with {method}, and {missing[0]} is not installed: {known.install}"
        )
    quiet()
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


# --------------------------------------------------------------------------------------------------
# Quantizing while loading


def require_library(kind: str) -> None:
    """Raise ModelError, with the line that installs it, where the library of a kind of quantization is missing."""
    if not is_installed(kind):
        raise ModelError(
            f"model.quantization.type={kind} needs the package {kind}, which is not installed: {INSTALL[kind]}"
        )
    quiet()


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
    skipped = _skipped(plain(), spec.skip_modules) if spec.skip_modules else None
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


def _skipped(model: nn.Module, names: tuple[str, ...]) -> list[str]:
    """Whole names of what stays plain: those that the recipe names by their last parts, and the heads."""
    named = [one for one, _ in model.named_modules() if any(one == n or one.endswith(f".{n}") for n in names)]
    return [*named, *_heads(model)]


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
        if is_int8(module) and device.type == "cpu":
            cls = type(module)
            module.__class__ = type(cls.__name__, (_SteadyInt8, cls), {"__module__": cls.__module__})
    model.requires_grad_(False)
    _require_right_expansion(layers, label)
    _require_gradients(layers, model.dtype, device, label)
    upcast_norms(model)


class _SteadyInt8(nn.Module):
    """Mixed into the class of a layer of LLM.int8() on a CPU: one arithmetic for training and evaluation.

    There bitsandbytes trains with inputs as they are and evaluates with inputs rounded to 8 bits; on a GPU both are
    rounded.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        training, self.training = self.training, True
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.training = training


def _require_right_expansion(layers: dict[str, nn.Module], label: str) -> None:
    """Raise ModelError where the library expands 4-bit weights to others than they stand for: bitsandbytes 0.50.2 on a
    CPU does where a row is no multiple of the 64 weights that share a scale. One layer of each shape is asked."""
    shapes: set[torch.Size] = set()
    for name, module in layers.items():
        state: Any = getattr(module.weight, "quant_state", None)
        if state is None or state.shape in shapes:
            continue
        shapes.add(state.shape)
        if not torch.equal(dequantized(module), looked_up(module)):
            outputs, inputs = state.shape
            raise ModelError(
                f"{label}: bitsandbytes expands the 4-bit weights of {name} ({outputs} x {inputs}) to other numbers on "
                f"{module.weight.device.type} than they stand for; name it in model.quantization.skip_modules, or "
                "give bits: 8"
            )


def _require_gradients(
    layers: dict[str, nn.Module], dtype: torch.dtype, device: torch.device, label: str
) -> None:
    """Raise ModelError where a gradient stops at a quantized layer: adapters below it would learn from the residual
    stream alone, and nobody would see it. torchao's layers with rounded inputs are such. One of each kind is asked."""
    kinds: set[tuple[type, type]] = set()
    for name, module in layers.items():
        kind = type(module), type(getattr(module, "weight", None))
        inputs = getattr(module, "in_features", None)
        if kind in kinds or not isinstance(inputs, int):
            continue
        kinds.add(kind)
        with torch.enable_grad():
            answer = module(torch.zeros(1, inputs, dtype=dtype, device=device, requires_grad=True))
        if not answer.requires_grad:
            raise ModelError(
                f"{label}: no gradient passes through {name} ({kind[1].__name__}), so an adapter below it would not "
                "learn what it does; choose another quantization"
            )


def _to_hqq(model: PreTrainedModel, spec: HqqSpec, device: torch.device, label: str) -> None:
    """Replace every linear layer but the heads. transformers 5.23 cannot: its HqqConfig is not carried out."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    # A linear layer by class as well, so that it is found wherever linear layers are looked for. `forward` is HQQ's;
    # who asks such a layer for its weight wants to know a device and a type.
    kind = type(
        "HQQLinear",
        (HQQLinear, nn.Linear),
        {"__module__": HQQLinear.__module__, "weight": property(lambda layer: layer.W_q)},
    )
    skipped = set(_skipped(model, spec.skip_modules))
    compute = DTYPES.get(spec.compute_dtype, model.dtype)
    for name, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear or name in skipped:
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


def require_adapter_method(model: nn.Module, method: MethodSpec, label: str) -> None:
    """Raise ModelError where a method would train, copy or add to weights that are rounded: the recipe cannot tell
    files that are quantized already."""
    layers = quantized_layers(model)
    if not layers:
        return
    if not isinstance(method, AdapterSpec):
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
