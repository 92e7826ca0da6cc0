"""LoRA's linear layer as one autograd node: the same product, fewer passes over memory.

PEFT computes base(x), then lora_B(lora_A(x)), a scaled copy of that, and a sum: three tensors of the size of
the output besides the output itself. Here the low-rank product is accumulated into the base product in place,
forward and backward. PEFT keeps the parameters, the configuration and the saving; only `forward` of its layer
is specialised, and only where the arithmetic is plain LoRA. Everything else runs PEFT's own code.

Shapes: T tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class _LoraProduct(torch.autograd.Function):
    """y = x W^T + b + s (x A^T) B^T with W and b frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scale: float,
    ) -> Tensor:
        a, b = a_RI.to(x_TI.dtype), b_OR.to(x_TI.dtype)
        low_TR = x_TI @ a.T
        y_TO = x_TI @ weight_OI.T if bias_O is None else torch.addmm(bias_O, x_TI, weight_OI.T)
        y_TO.addmm_(low_TR, b.T, alpha=scale)
        ctx.save_for_backward(x_TI, weight_OI, a, b, low_TR)
        ctx.scale, ctx.adapter_dtype = scale, a_RI.dtype
        return y_TO

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, weight_OI, a, b, low_TR = ctx.saved_tensors
        dy_TO = upstream[0]
        dlow_TR = (dy_TO @ b).mul_(ctx.scale)
        dx_TI = None
        if ctx.needs_input_grad[0]:
            dx_TI = dy_TO @ weight_OI
            dx_TI.addmm_(dlow_TR, a)
        da_RI = (dlow_TR.T @ x_TI).to(ctx.adapter_dtype)
        db_OR = (dy_TO.T @ low_TR).mul_(ctx.scale).to(ctx.adapter_dtype)
        return dx_TI, None, None, da_RI, db_OR, None


class _FusedForward(PeftLinear):
    """Mixed into the class of a PEFT LoRA layer."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapters = self._plain_adapters(x, args, kwargs)
        if not adapters:
            return super().forward(x, *args, **kwargs)
        base = self.get_base_layer()
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        flat_TI = x.reshape(-1, x.shape[-1]).to(dtype)
        a, b = self.lora_A[adapters[0]].weight, self.lora_B[adapters[0]].weight
        if len(adapters) > 1:  # one product of the ranks' sum: what trains, and the start that is taken off
            layers: list[Any] = [(self.lora_A[name], self.lora_B[name]) for name in adapters]
            a = torch.cat([low.weight for low, _ in layers])
            b = torch.cat([high.weight for _, high in layers], dim=1)
        with torch.autocast(device, enabled=False):
            bias = None if base.bias is None else base.bias.to(dtype)
            weight = base.weight.to(dtype)
            out_TO = _LoraProduct.apply(flat_TI, weight, bias, a, b, self.scaling[adapters[0]])  # type: ignore[no-untyped-call]
        assert isinstance(out_TO, Tensor)
        return out_TO.view(*x.shape[:-1], -1)

    def _plain_adapters(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        """The active adapters, if this call is plain LoRA on a frozen linear layer, of one scale, and the first of
        them trains; else none."""
        # A layer that computes its activations again runs without gradients first, and must say the same then.
        learns = torch.is_grad_enabled() or self.training
        if args or kwargs or self.disable_adapters or self.merged or not learns:
            return []
        active = [name for name in self.active_adapters if name in self.lora_A]
        base = self.get_base_layer()
        if not active or type(base) is not nn.Linear or any(p.requires_grad for p in base.parameters()):
            return []
        if isinstance(base.weight, DTensor):  # a part of it, whose products the processes add up
            return []
        first = active[0]
        plain = not self.fan_in_fan_out and all(self._is_plain(name) for name in active)
        trains = self.lora_A[first].weight.requires_grad and self.lora_B[first].weight.requires_grad
        same = x.is_floating_point() and (
            torch.is_autocast_enabled(x.device.type) or x.dtype == base.weight.dtype
        )
        return active if plain and trains and same and self._one_scale(active) else []

    def _is_plain(self, name: str) -> bool:
        still = isinstance(self.lora_dropout[name], nn.Identity) or not self.training
        return still and name not in self.lora_variant and not self.lora_bias[name]

    def _one_scale(self, names: list[str]) -> bool:
        return len({self.scaling[name] for name in names}) == 1


# One class for all layers: torch.compile would compile anew for every class.
_FusedLinear = type("Linear", (_FusedForward,), {"__module__": PeftLinear.__module__})


def fuse_lora(model: nn.Module) -> int:
    """Specialise every plain LoRA layer of a PEFT model; returns how many there are."""
    layers = [module for module in model.modules() if type(module) is PeftLinear]
    for module in layers:
        module.__class__ = _FusedLinear
    return len(layers)
