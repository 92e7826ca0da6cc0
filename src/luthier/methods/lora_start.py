"""LoRA that starts from the weight's own factors (PiSSA, OLoRA, CorDA), on a base that nobody touches.

All start A and B at a part B0 A0 of the weight W and train W - s B0 A0 + s B A. Here that is computed as
W + s (B A - B0 A0): the start is a second adapter of PEFT, frozen and with its sign turned. So the base is the
base throughout: adapters off is the model that training started from, a checkpoint needs nothing of the run that
wrote it, and what is saved is a plain LoRA of twice the rank, [B, -B0] [A; A0], for the untouched base.

PiSSA: Meng et al., 2024, arXiv:2404.02948. OLoRA: Büyükakyüz, 2024, arXiv:2406.01775. The factors are PEFT's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.methods.adapter_files import ADAPTER
from luthier.model.quantized_layers import is_quantized_layer
from luthier.types import CheckpointError, ModelError

START = "start"
"""The name of the frozen second adapter."""
_FILE = "adapter_model.safetensors"
_A, _B = ".lora_A.weight", ".lora_B.weight"


def start_from_weights(model: PeftModel, init: str, iterations: int | None) -> None:
    """Give the fresh adapter of `model` the factors of its weights, and add the frozen start that takes them off.

    Raises ModelError as `add_start` does.
    """
    add_start(model, init)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            if init == "olora":
                start_layer(layer, partial(layer.olora_init, ADAPTER))
            else:
                name = "pissa" if iterations is None else f"pissa_niter_{iterations}"
                start_layer(layer, partial(layer.pissa_init, ADAPTER, name))


def add_start(model: PeftModel, init: str) -> None:
    """Add a frozen start, which like the fresh adapter of `model` does nothing yet.

    Raises ModelError for an adapter on anything but linear layers of plain weights, and for a rank above theirs.
    """
    config: Any = model.peft_config[ADAPTER]
    frozen = replace(
        config, lora_dropout=0.0, modules_to_save=None, trainable_token_indices=None, bias="none"
    )
    model.add_adapter(START, frozen)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            _require_factors(name, layer, init)
    activate_start(model)


def activate_start(model: nn.Module) -> None:
    """Both adapters add to the base, and the start is frozen."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and START in layer.lora_A:
            trained = [parameter.requires_grad for parameter in layer.lora_A[ADAPTER].parameters()]
            layer.set_adapter([ADAPTER, START])
            for part in (layer.lora_A, layer.lora_B):
                part[START].requires_grad_(False)
            layer.lora_A[ADAPTER].requires_grad_(all(trained))


def has_start(model: PeftModel) -> bool:
    """Whether `model` was given a frozen start."""
    return START in model.peft_config


def _require_factors(name: str, layer: LoraLayer, init: str) -> None:
    base: Any = layer.get_base_layer()
    if not isinstance(base, nn.Linear | Conv1D) or is_quantized_layer(base):
        raise ModelError(
            f"method.init={init} takes factors of plain linear weights, and {name} is a {type(base).__name__}; "
            f"choose other targets, or init: {'loftq' if is_quantized_layer(base) else 'default'}"
        )
    rank, most = layer.r[ADAPTER], min(base.weight.shape)
    if rank > most:
        raise ModelError(
            f"method.init={init}: the rank is {rank}, and the weight of {name} has at most {most}; lower method.rank, "
            "or give this layer its own in method.rank_pattern"
        )


@torch.no_grad()
def start_layer(layer: Any, initialise: Callable[[], None]) -> None:
    """Put the factors that PEFT's `initialise` takes off the weight into the adapter of a layer, and into its start."""
    base = layer.get_base_layer()
    weight = base.weight.data
    base.weight.data = weight.clone()  # PEFT takes the factors off in place
    try:
        initialise()
    finally:
        base.weight.data = weight
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    for matrix in (a, b):
        matrix.data = matrix.data.to(layer.lora_A[START].weight.dtype).contiguous()
    layer.lora_A[START].weight.copy_(a)
    layer.lora_B[START].weight.copy_(-b)


def write_plain(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Turn the adapter that PEFT saved in `folder` into a plain LoRA of twice the rank; `state` has its start."""
    weights = load_file(folder / _FILE)
    for name in weights:
        for end, axis in ((_A, 0), (_B, 1)):
            if name.endswith(end):
                start = state[_of_start(name)].to(weights[name].device, weights[name].dtype)
                weights[name] = torch.cat([weights[name], start], dim=axis).contiguous()
    save_file(weights, folder / _FILE, metadata={"format": "pt"})
    config = PeftConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig)
    # The scale alpha / rank, or alpha / sqrt(rank), stays what it was.
    alpha: Any = math.sqrt(2) if config.use_rslora else 2
    changed: dict[str, Any] = {
        "r": 2 * config.r,
        "lora_alpha": alpha * config.lora_alpha,
        "rank_pattern": {name: 2 * rank for name, rank in (config.rank_pattern or {}).items()},
        "alpha_pattern": {name: alpha * value for name, value in (config.alpha_pattern or {}).items()},
    }
    path = folder / "adapter_config.json"
    text = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(text | changed, indent=2, sort_keys=True), encoding="utf-8")


def take_start(model: PeftModel, weights: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The part of a saved plain LoRA that trains; the rest goes into the start of `model`.

    Raises CheckpointError where the ranks are not twice those of the model.
    """
    own, kept = dict(model.named_parameters()), dict(weights)
    for name, tensor in weights.items():
        for end, axis in ((_A, 0), (_B, 1)):
            place = own.get(_of_start(name)) if name.endswith(end) else None
            if place is None:
                continue
            if tensor.shape[axis] != 2 * place.shape[axis]:
                raise CheckpointError(
                    f"{folder} does not fit the adapter: {name} has rank {tensor.shape[axis]}, and with method.init it "
                    f"is twice {place.shape[axis]}"
                )
            trained, start = tensor.chunk(2, dim=axis)
            kept[name] = trained.contiguous()
            place.data.copy_(start)
    return kept


def _of_start(name: str) -> str:
    module, _, end = name.rpartition(".")
    return f"{module}.{START}.{end}"
