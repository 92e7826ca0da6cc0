"""The matrices of every layer divided among processes that compute the same rows (Shoeybi et al., 2019,
arXiv:1909.08053), by torch's `parallelize_module` and the plan that transformers has for the model's family.

A layer's first matrices are divided by outputs (an attention by its heads), its last by inputs, whose products are
added up. What lies outside of the layers (embeddings, head, norms) each process holds whole, so the head is called as
ever. Rows, the loss and what is drawn are the same on all processes of a group; several groups average their gradients.

Before and after it is divided, the model is asked for the same numbers and gradients: a plan that does not suit it is
found before it trains.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Replicate, Shard
from transformers import PreTrainedConfig, PreTrainedModel

from luthier.model.multimodal import is_multimodal
from luthier.model.probes import LANGUAGE, TOLERANCE, Probe, inner_model
from luthier.model.selftest import two_segments
from luthier.model.value_head import ScoreProbe
from luthier.parallel.fsdp import FullyShard
from luthier.types import ModelError

_BY_OUTPUTS = ("colwise", "colwise_gather_output", "colwise_rep")
_BY_INPUTS = ("rowwise", "rowwise_split_input", "rowwise_rep")
_EACH_OWN_HEADS = "replicated_with_grad_allreduce"
_KEYS = ("k_proj", "qkv_proj", "query_key_value")
_RATES = ("attention_dropout", "activation_dropout", "attn_pdrop", "resid_pdrop", "hidden_dropout", "dropout")
_ELSE = "use parallel: {type: fsdp2} or {type: ddp}"


class TensorParallel(FullyShard):
    """`group` neighbours divide every layer's matrices; of `processes` in all. Files are those of `FullyShard`."""

    name = "tensor"
    writes_parts = False

    def __init__(self, group: int, processes: int, arithmetic: torch.dtype | None) -> None:
        """`arithmetic` is the type of the autocast that training uses."""
        self.copies, self._arithmetic = group, arithmetic
        self._groups = processes // group
        self._mesh: DeviceMesh | None = None

    # ---- the model ---------------------------------------------------------------------------------

    def divide(self, model: nn.Module) -> None:
        """Raises ModelError for a model that cannot be divided so, or answers otherwise when it is."""
        inner: Any = inner_model(model)
        assert isinstance(inner, PreTrainedModel)
        plan = require_plan(inner.config, self.copies)
        if self._mesh is None:
            names, shape = ("rows", "layers"), (self._groups, self.copies)
            self._mesh = init_device_mesh(PartialState().device.type, shape, mesh_dim_names=names)
        styles = dict(_styles(inner.base_model, plan, self.copies))
        outside = _outside(inner, styles)
        before = _asked(model, outside, self._arithmetic)
        for module, style in styles.items():
            _divide(module, style, self._mesh["layers"])
        nn.Module.to(model, PartialState().device)
        try:
            after = _asked(model, outside, self._arithmetic)
        except (RuntimeError, ValueError, IndexError) as error:
            raise ModelError(
                f"parallel: tensor: a divided {type(inner).__name__} cannot compute ({error}); {_ELSE}"
            ) from error
        kind = self._arithmetic or next(inner.parameters()).dtype
        _require_same(inner, before, after, TOLERANCE[kind])

    def wrap(self, accelerator: Accelerator, model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
        return model, optimizer

    def wrapped(self, model: nn.Module) -> str:
        divided = any(isinstance(parameter, DTensor) for parameter in model.parameters())
        return DTensor.__name__ if divided else type(model).__name__

    # ---- a step ------------------------------------------------------------------------------------

    def synchronizing(
        self, accelerator: Accelerator, model: nn.Module, *, last: bool
    ) -> AbstractContextManager[Any]:
        return nullcontext()

    def backward(self, accelerator: Accelerator, model: nn.Module, loss: Tensor, *, last: bool) -> None:
        accelerator.backward(loss)
        if last and self._groups > 1:
            assert self._mesh is not None
            others = self._mesh["rows"].get_group()
            for gradient in _gradients(model):
                dist.all_reduce(_own(gradient), group=others)
                _own(gradient).div_(self._groups)

    def clip(self, accelerator: Accelerator, model: nn.Module, max_norm: float) -> Tensor:
        accelerator.unscale_gradients()
        assert self._mesh is not None
        gradients = list(_gradients(model))
        squares = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        for gradient in gradients:
            # What all hold counts once; as a sum over all it is the same everywhere, to the last bit.
            share = 1 if _is_part(gradient) else self.copies
            squares += _own(gradient).norm(dtype=torch.float32).double().square() / share
        dist.all_reduce(squares, group=self._mesh["layers"].get_group())
        norm = squares.sqrt().float()
        if max_norm < float("inf"):
            scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                _own(gradient).mul_(scale)
        return norm


# --------------------------------------------------------------------------------------------------
# The plan of a family


def require_plan(config: PreTrainedConfig, group: int | None = None) -> Mapping[str, str]:
    """How the layers of a model are divided, by names below its backbone; what `group` processes cannot share is
    refused. Raises ModelError."""
    name, text = (config.architectures or [type(config).__name__])[0], config.get_text_config()
    if is_multimodal(config):
        raise ModelError(f"parallel: tensor with {name}: towers of images or sounds are not divided; {_ELSE}")
    plan: dict[str, str] = dict(getattr(text, "base_model_tp_plan", None) or {})
    if not plan:
        raise ModelError(f"parallel: tensor: transformers has no plan of how {name} is divided; {_ELSE}")
    known = (*_BY_OUTPUTS, *_BY_INPUTS, _EACH_OWN_HEADS)
    if others := {style for style in plan.values() if style not in known}:
        raise ModelError(
            f"parallel: tensor: {name} is divided by {', '.join(sorted(others))}, which is not proven here (experts "
            f"and fused matrices have ways of their own); {_ELSE}"
        )
    for key in _RATES:
        if isinstance(rate := getattr(text, key, None), float) and rate > 0:
            raise ModelError(
                f"parallel: tensor: the config of {name} has {key}={rate}, and each process would draw it for its own "
                f"heads; make it 0, or {_ELSE}"
            )
    by_heads = any(key.endswith(_KEYS) and style == "colwise" for key, style in plan.items())
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text, key, None)
        if by_heads and group is not None and isinstance(heads, int) and heads % group:
            raise ModelError(
                f"parallel: tensor: {group} processes cannot share the {heads} heads of {name} ({key}); give a group "
                f"that divides {heads}"
            )
    return plan


def _styles(backbone: nn.Module, plan: Mapping[str, str], group: int) -> Iterator[tuple[nn.Module, str]]:
    """The modules of the plan; in an adapter's place its base, and the one of its matrices that goes with it."""
    matched = set()
    for name, module in backbone.named_modules():
        rule = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        if (style := plan.get(rule)) is None:
            continue
        matched.add(rule)
        if isinstance(module, LoraLinear):
            low_or_high = module.lora_B if style in _BY_OUTPUTS else module.lora_A
            parts = [module.get_base_layer(), *low_or_high.values()]
        else:
            parts = [module]
        for part in parts:
            _require_part(name, part, style, group)
            yield part, style
    if missing := sorted(set(plan) - matched):
        raise ModelError(
            f"parallel: tensor: the plan of {type(backbone).__name__} names {', '.join(missing)}, which it has not; "
            f"{_ELSE}"
        )


def _require_part(name: str, module: nn.Module, style: str, group: int) -> None:
    if style == _EACH_OWN_HEADS:
        return
    if not isinstance(module, nn.Linear):
        raise ModelError(
            f"parallel: tensor divides plain linear layers and LoRA on them, and {name} is a "
            f"{type(module).__name__}; {_ELSE}"
        )
    size = module.out_features if style in _BY_OUTPUTS else module.in_features
    if size % group:
        raise ModelError(
            f"parallel: tensor: {group} processes cannot share the {size} "
            f"{'outputs' if style in _BY_OUTPUTS else 'inputs'} of {name}; give another group"
        )


def _divide(module: nn.Module, style: str, mesh: DeviceMesh) -> None:
    if style == _EACH_OWN_HEADS:
        # Its gradient is a sum over heads, and each process has that of its own.
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(partial(_added_up, group=mesh.get_group()))  # type: ignore[no-untyped-call]
        return
    way: ParallelStyle
    if style in _BY_OUTPUTS:
        way = ColwiseParallel(output_layouts=Shard(-1) if style == "colwise" else Replicate())
    else:
        way = RowwiseParallel(input_layouts=Shard(-1) if style == "rowwise" else Replicate())
    # All have loaded the same weights: nothing has to be sent.
    parallelize_module(module, mesh, way, src_data_rank=None)
    for parameter in module.parameters():
        assert isinstance(parameter, DTensor)
        own = parameter.to_local()
        if own.untyped_storage().nbytes() > own.nbytes:  # a view would keep the whole
            own.data = own.data.clone()


def _added_up(gradient: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    whole = gradient.clone()
    dist.all_reduce(whole, group=group)
    return whole


# --------------------------------------------------------------------------------------------------
# The same numbers


def _outside(model: PreTrainedModel, styles: Mapping[nn.Module, str]) -> list[nn.Parameter]:
    """What trains, is held whole by each, and is small: norms within the layers, and an adapter's other matrices."""
    parts = {
        one for module, style in styles.items() if style != _EACH_OWN_HEADS for one in module.parameters()
    }
    inner: Any = model
    ends = {
        one
        for module in (inner.get_input_embeddings(), inner.get_output_embeddings())
        if isinstance(module, nn.Module)
        for one in module.parameters()
    }
    return [one for one in model.parameters() if one.requires_grad and one not in parts | ends]


def _asked(
    model: nn.Module, watched: list[nn.Parameter], arithmetic: torch.dtype | None
) -> tuple[Tensor, list[Tensor | None]]:
    """What the model says of two random segments, and the gradients of its sum, in float32 on the host."""
    inner: Any = inner_model(model)
    training, device = model.training, next(model.parameters()).device
    probe: Probe = ScoreProbe() if inner.get_output_embeddings() is None else LANGUAGE
    batch = two_segments(inner.config.get_text_config().vocab_size, device)
    model.eval()
    try:
        mixed = torch.autocast(device.type, dtype=arithmetic, enabled=arithmetic is not None)
        with torch.set_grad_enabled(bool(watched)), mixed:
            numbers = probe.together(model, batch)
        found = torch.autograd.grad(numbers.sum(), watched, allow_unused=True) if watched else ()
    finally:
        model.train(training)
    return numbers.detach().float().cpu(), [None if one is None else one.float().cpu() for one in found]


def _require_same(
    model: PreTrainedModel,
    before: tuple[Tensor, list[Tensor | None]],
    after: tuple[Tensor, list[Tensor | None]],
    tolerance: float,
) -> None:
    """Raise ModelError where numbers are further apart than `tolerance`, or gradients by that part of the largest."""
    apart = float((after[0] - before[0]).abs().max())
    gradients = [
        float((two - one).abs().max() / one.abs().max().clamp(min=1e-12))
        for one, two in zip(before[1], after[1], strict=True)
        if one is not None and two is not None
    ]
    worst = max(gradients, default=0.0)
    if not (apart <= tolerance and worst <= tolerance):  # NaN too
        raise ModelError(
            f"parallel: tensor: divided as its plan says, {type(model).__name__} answers otherwise: by {apart:.2g}, "
            f"and by {worst:.2g} of a gradient (allowed {tolerance:g}); {_ELSE}"
        )


# --------------------------------------------------------------------------------------------------
# Gradients


def _gradients(model: nn.Module) -> Iterator[Tensor]:
    for parameter in model.parameters():
        if parameter.grad is not None:
            yield parameter.grad


def _own(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _is_part(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor) and any(isinstance(one, Shard) for one in tensor.placements)
