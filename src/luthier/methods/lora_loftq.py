"""LoRA that starts from what rounding took away (LoftQ, Li et al., 2023, arXiv:2310.08659).

One iteration of it, the first: with Q the rounded weight, s B A is the best matrix of rank R for W - Q. So the base is
the quantized base throughout, as the recipe says it, and the saved adapter goes on that. Further iterations would
round W - s B A in place of W: another base, which nobody but this run has.

W is what the base's own files hold. Shapes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor

from luthier.methods.adapter_files import ADAPTER
from luthier.model.quantized_layers import dequantized, is_quantized_layer
from luthier.types import ModelError

_PREFIX = "base_model.model."


@torch.no_grad()
def start_from_rounding(
    model: PeftModel, original: Callable[[str], Tensor], iterations: int | None, say: Callable[[str], None]
) -> None:
    """Give the fresh adapter of `model` the best factors of W - Q on every quantized layer; others stay as drawn.

    `original` gives a weight (O, I) by its name in the base; `iterations` are those of a fast, approximate SVD, None
    for the exact one. Raises ModelError where no adapted layer is quantized, and where a weight in the files has
    another shape.
    """
    layers: dict[str, Any] = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and is_quantized_layer(layer.get_base_layer())
    }
    if not layers:
        raise ModelError(
            "method.init=loftq makes up for what rounding took away, and none of the layers of method.targets is "
            "quantized; choose init: default"
        )
    say(f"method.init=loftq: factors of what rounding took from {len(layers)} layers")
    for name, layer in layers.items():
        rounded_OI = dequantized(layer.get_base_layer()).float()
        name = f"{name.removeprefix(_PREFIX)}.weight"
        weight_OI = original(name).to(rounded_OI.device, torch.float32)
        if weight_OI.shape != rounded_OI.shape:
            raise ModelError(
                f"method.init=loftq: {name} is {tuple(weight_OI.shape)} in the files and {tuple(rounded_OI.shape)} in "
                "the model; choose init: default"
            )
        rank, scale, most = layer.r[ADAPTER], layer.scaling[ADAPTER], min(weight_OI.shape)
        if rank > most:
            raise ModelError(
                f"method.init=loftq: the rank is {rank}, and the weight of {name} has at most {most}; lower method.rank"
            )
        left_OK, sizes_K, right_KI = _factors(weight_OI - rounded_OI, rank, iterations)
        roots_R = (sizes_K[:rank] / scale).sqrt()
        layer.lora_A[ADAPTER].weight.copy_(roots_R[:, None] * right_KI[:rank])
        layer.lora_B[ADAPTER].weight.copy_(left_OK[:, :rank] * roots_R)


def _factors(lost_OI: Tensor, rank: int, iterations: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """U (O, K), S (K,) and V^T (K, I) of at least `rank` singular values; the fast one draws with a seed of its own."""
    if iterations is None:
        exact: tuple[Tensor, Tensor, Tensor] = torch.linalg.svd(lost_OI, full_matrices=False)
        return exact
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # Twice the rank: what rounding loses is nearly noise, whose singular values lie close together.
        left_OK, sizes_K, right_IK = torch.svd_lowrank(lost_OI, min(2 * rank, *lost_OI.shape), iterations)
    return left_OK, sizes_K, right_IK.T
