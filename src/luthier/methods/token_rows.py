"""Trained token rows without touching the others: the same product as PEFT's, and a fraction of its memory.

PEFT writes the trained rows into a copy of the whole embedding matrix at every call, and its backward has a
gradient of that size; it also forgets the bias of an output head. Here the frozen layer runs as it is and only
the places or columns of the trained tokens are replaced. PEFT keeps the parameters, the configuration, the
merging and the saving; only `forward` of its layer is specialised, and where several adapters are active, or
none, PEFT's own code runs.

Shapes: N positions, D hidden, V vocabulary, R trained rows.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch import Tensor, nn
from torch.nn import functional


class _RowsForward(TrainableTokensLayer):
    """Mixed into the class of a PEFT layer that trains some token rows."""

    def forward_adapters(self, x: Tensor, active_adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self.get_base_layer()
        plain = len(active_adapters) == 1 and not self.disable_adapters and not self.merged
        if not plain or args or kwargs or any(parameter.requires_grad for parameter in base.parameters()):
            return super().forward_adapters(x, active_adapters, *args, **kwargs)
        rows_RD = self.trainable_tokens_delta[active_adapters[0]].to(base.weight.dtype)
        indices = torch.tensor(self.token_indices[active_adapters[0]], device=x.device)
        if isinstance(base, nn.Embedding):
            return self._embedded(base, x, rows_RD, indices)
        return _projected(base, x, rows_RD, indices)

    def _embedded(self, base: nn.Embedding, ids: Tensor, rows_RD: Tensor, indices: Tensor) -> Tensor:
        place = torch.full((base.num_embeddings,), -1, device=ids.device)
        place[indices] = torch.arange(len(indices), device=ids.device)
        place_N = place[ids]
        frozen_ND = base(ids)
        scale = self._get_embed_scale()  # type: ignore[no-untyped-call]
        trained_RD = rows_RD if scale is None else rows_RD * scale.to(rows_RD.dtype)
        trained_ND = functional.embedding(place_N.clamp(min=0), trained_RD)
        return torch.where((place_N >= 0)[..., None], trained_ND, frozen_ND)


def _projected(base: nn.Linear, hidden_ND: Tensor, rows_RD: Tensor, indices: Tensor) -> Tensor:
    logits_NV: Tensor = base(hidden_ND)
    bias = None if base.bias is None else base.bias[indices]
    trained_NR = functional.linear(hidden_ND, rows_RD, bias)
    # In place: a copy of the logits would be the largest tensor of the step once more.
    logits_NV[..., indices] = trained_NR.to(logits_NV.dtype)
    return logits_NV


_LightRows = type("TrainableTokensLayer", (_RowsForward,), {"__module__": TrainableTokensLayer.__module__})


def fuse_token_rows(model: nn.Module) -> int:
    """Specialise every such layer of a PEFT model; returns how many there are."""
    layers = [module for module in model.modules() if type(module) is TrainableTokensLayer]
    for module in layers:
        module.__class__ = _LightRows
    return len(layers)
