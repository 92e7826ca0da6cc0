"""Tiny models whose activations are kept, computed twice or moved: how they are built, and what they compute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from luthier.data.collate import branch_batch, flat_batch
from luthier.methods import build_method
from luthier.model.checkpointing import checkpoint_layers
from luthier.model.logprobs import ModelPolicy, install_target_forward
from luthier.model.rows import Rows
from luthier.recipe.schema import CheckpointingSpec, FreezeSpec, FullSpec, LoraSpec, MethodSpec
from luthier.types import Batch
from tests.tiny import random_pairs, random_samples

METHODS: dict[str, MethodSpec] = {
    "full": FullSpec(),
    "freeze": FreezeSpec(layers=1),
    "lora": LoraSpec(rank=4, alpha=7.3),
    "lora-dropout": LoraSpec(rank=4, dropout=0.3),
}
ROWS = {
    "flat": flat_batch(random_samples([9, 17, 5])),
    "shared": branch_batch(random_pairs([(7, 5, 6), (4, 8, 3)]), share_prompts=True),
}


def in_training(base: PreTrainedModel, method: MethodSpec, spec: CheckpointingSpec | None) -> Any:
    """The model as a run trains it; adapters are not at their start, where half of their gradients are 0."""
    if spec is not None:
        checkpoint_layers(base, spec)
    torch.manual_seed(1)
    model: Any = build_method(method).apply(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    install_target_forward(base, Rows(shares_prompts=True))
    return model.train()


def gradients_of(
    model: Any, batch: Batch, autocast: torch.dtype | None = None
) -> tuple[float, Mapping[str, Tensor]]:
    """The loss, and the gradients of all that trains, which the model does not keep."""
    torch.manual_seed(2)  # what dropout draws
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        loss = -ModelPolicy(model).logprobs(batch).logprobs.sum()
    loss.backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return float(loss.detach()), found
