"""Which parameters train, and in which optimizer group. Knows no optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_pt_utils import get_parameter_names

from luthier.model.multimodal import frozen_parts
from luthier.model.quantized_layers import num_weights

NO_DECAY_NAMES = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


@dataclass(frozen=True, slots=True)
class ParameterCount:
    trainable: int
    total: int


def count_parameters(model: nn.Module) -> ParameterCount:
    """Parameters that train and all parameters; tied ones count once, packed ones as the weights that they hold."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return ParameterCount(trainable, num_weights(model))


def checkpoints_activations(model: nn.Module) -> bool:
    """Whether any layer computes its activations again in backward; transformers renamed its own property."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def require_input_gradients(model: PreTrainedModel) -> None:
    """Let the embedded tokens ask for a gradient, and what goes into towers that train or carry an adapter.

    Into a frozen tower none is sent: its activations would be kept for nothing.
    """
    if "tower" not in frozen_parts(model):
        model.enable_input_require_grads()  # type: ignore[no-untyped-call]
        return
    for module in model.modules():
        # PEFT asks transformers for the hooks on all towers, more than once, and keeps only the last handles.
        for number, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") == "make_inputs_require_grads":
                del module._forward_hooks[number]
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_(True))


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, as transformers' Trainer makes them: biases and norms are not decayed."""
    norms = [nn.LayerNorm, nn.RMSNorm]
    decayed = set(get_parameter_names(model, norms, NO_DECAY_NAMES))  # type: ignore[no-untyped-call]
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in trained if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
