"""Adam-mini (Zhang et al., 2024, arXiv:2406.16793, algorithm 1): one second moment for each block of a parameter.

Blocks follow the Hessian's: an attention head of queries and keys; an output neuron of values, projections, MLPs,
embeddings (a token there) and the head; the whole tensor of a norm. Biases keep Adam's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.optim.parameterwise import Groups, ParameterWise
from luthier.optim.roles import places

ENTRY, TENSOR = 0, -1


class AdamMini(ParameterWise):
    """Groups have lr, weight_decay, betas and eps. State: a momentum of the parameter's shape, and one number for each
    block. Weight decay is AdamW's."""

    def __init__(self, groups: Groups, defaults: dict[str, Any], blocks: dict[int, int]) -> None:
        """blocks: by a parameter's `id`, how many of its entries in a row are a block; ENTRY for each by itself, TENSOR
        for all of them."""
        super().__init__(groups, defaults)
        self._blocks = blocks

    def update(self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        size = self._blocks[id(parameter)]
        blocks = (parameter.numel() // size, size) if size > 0 else (1, -1) if size == TENSOR else (-1, 1)
        squares = grad.reshape(blocks).square().mean(dim=1, keepdim=True)
        if "exp_avg" not in state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(grad), "exp_avg_sq": torch.zeros_like(squares)}
        state["step"] += 1
        (beta1, beta2), lr = group["betas"], group["lr"]
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).add_(squares, alpha=1 - beta2)
        root = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        direction = (state["exp_avg"].reshape(blocks) / root).view_as(parameter)
        parameter.mul_(1 - lr * group["weight_decay"])
        parameter.add_(direction, alpha=-lr / (1 - beta1 ** state["step"]))


def adam_mini_blocks(model: nn.Module) -> dict[int, int]:
    """Entries in a row that share a second moment, for every parameter of `model`, by its `id`."""
    config: Any = getattr(model, "config", None)
    text: Any = config.get_text_config() if config is not None else None
    heads = getattr(text, "num_attention_heads", 0)
    head_dim = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
    found, sizes = places(model), {}
    for parameter in model.parameters():
        place = found[id(parameter)]
        module = place.name.split(".")[-2:-1]
        if place.name.endswith("bias"):
            size = ENTRY
        elif parameter.ndim < 2:
            size = TENSOR
        elif module in (["q_proj"], ["k_proj"]) and head_dim and parameter.shape[0] % head_dim == 0:
            size = head_dim * parameter.shape[1]
        else:
            size = parameter.shape[-1]
        sizes[id(parameter)] = size
    for part in model.modules():
        if isinstance(part, Conv1D):  # its columns are the neurons: entries that are not in a row
            sizes[id(part.weight)] = ENTRY
    return sizes
