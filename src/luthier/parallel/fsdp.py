"""Weights, gradients and optimizer divided among the processes, by torch's `fully_shard` (FSDP2; Zhao et al., 2023,
arXiv:2304.11277).

Each decoder layer is a group whose weights are gathered for its forward and its backward; what is left (norms, tied
embeddings, towers of media) is one more, that of the model. A parameter is a `DTensor` of which each process holds
rows. transformers and accelerate do not wrap the model again: accelerate would, on a CPU, without a word, train with
DistributedDataParallel instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard
from torch.optim import Optimizer
from transformers import PreTrainedModel

from luthier.methods.full import decoder_layers
from luthier.model.multimodal import trains_outside_language
from luthier.parallel.strategy import State
from luthier.recipe.parallel import Fsdp2Spec
from luthier.types import ModelError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class FullyShard:
    """torch's FSDP2 over all processes."""

    name = "fsdp2"
    shards = True
    copies = 1
    loads_on_host = True

    def __init__(self, spec: Fsdp2Spec) -> None:
        self._spec = spec
        self.writes_parts = spec.state == "sharded"

    # ---- the model ---------------------------------------------------------------------------------

    def divide(self, model: nn.Module) -> None:
        """Raises ModelError for a model without a list of decoder layers, and for one whose tower of media trains."""
        inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        assert isinstance(inner, PreTrainedModel)
        _require_same_work(model)
        device = PartialState().device.type
        mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
        offload = CPUOffloadPolicy(pin_memory=device == "cuda") if self._spec.cpu_offload else OffloadPolicy()
        how: dict[str, Any] = {
            "mesh": mesh,
            # Said of the root too, for which torch has another default: after a forward pass parameters are parts.
            "reshard_after_forward": True,
            "offload_policy": offload,
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=_DTYPES.get(self._spec.param_dtype or ""),
                reduce_dtype=_DTYPES.get(self._spec.reduce_dtype or ""),
            ),
        }
        for group in _groups(inner):
            fully_shard(group, **how)
        fully_shard(model, **how)
        assert isinstance(model, FSDPModule)
        if not self._spec.reshard_after_forward:
            model.register_forward_pre_hook(_keep_for_backward)

    def wrap(self, accelerator: Accelerator, model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
        return model, optimizer

    def wrapped(self, model: nn.Module) -> str:
        return FSDPModule.__name__ if isinstance(model, FSDPModule) else type(model).__name__

    # ---- a step ------------------------------------------------------------------------------------

    def synchronizing(
        self, accelerator: Accelerator, model: nn.Module, *, last: bool
    ) -> AbstractContextManager[Any]:
        assert isinstance(model, FSDPModule)
        # Sums of single passes would be whole gradients on every process: each keeps its part of them instead.
        model.set_requires_gradient_sync(last or self._spec.reduce_each_pass)
        model.set_is_last_backward(last)
        return nullcontext()

    def backward(self, accelerator: Accelerator, model: nn.Module, loss: Tensor, *, last: bool) -> None:
        accelerator.backward(loss)

    def clip(self, accelerator: Accelerator, model: nn.Module, max_norm: float) -> Tensor:
        accelerator.unscale_gradients()
        parts = [_part(one.grad) for one in model.parameters() if one.grad is not None]
        # Parts that are kept in the host's memory cannot be added up there by the device's processes.
        own = torch.nn.utils.get_total_norm(parts).to(accelerator.device)
        squares = own.double().square()
        torch.distributed.all_reduce(squares)
        norm = squares.sqrt().float()
        if max_norm < float("inf"):
            scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            for part in parts:
                part.mul_(scale.to(part.device))
        return norm

    # ---- files -------------------------------------------------------------------------------------

    def whole(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        # A part in the host's memory has to travel over the device that speaks with the others.
        part: Any = tensor.detach().to(tensor.device_mesh.device_type)
        whole: Tensor = part.full_tensor()
        return whole

    @contextmanager
    def editing(self, model: nn.Module) -> Iterator[None]:
        with ExitStack() as hooks:
            for module in model.modules():
                handle = module.register_load_state_dict_pre_hook(_take_parts)  # type: ignore[no-untyped-call]
                hooks.callback(handle.remove)
            yield

    def optimizer_state(self, optimizer: Any) -> State:
        state: State = optimizer.state_dict()
        return state

    def load_optimizer(self, optimizer: Any, state: Mapping[str, Any]) -> None:
        inner = getattr(optimizer, "optimizer", optimizer)
        optimizer.load_state_dict(_parts_of_state(inner, state))


# --------------------------------------------------------------------------------------------------
# Groups


def _groups(model: PreTrainedModel) -> Iterator[nn.Module]:
    """What is gathered by itself: the decoder layers, and embeddings and head where they are two matrices."""
    yield from decoder_layers(model)[1]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if isinstance(head, nn.Module) and not set(embedding.parameters()) & set(head.parameters()):
        yield embedding
        yield head


def _require_same_work(model: nn.Module) -> None:
    """All processes have to gather the same groups in the same order, and add up gradients of the same parameters. A
    process whose rows have no image calls no tower: what is frozen of it is gathered with the root."""
    if trains_outside_language(model):
        raise ModelError(
            "parallel: fsdp2 with a tower of media that trains: a process whose rows have none would have no gradient "
            "of it, and the others would wait; hold all towers still (model.frozen_parts) or use parallel: {type: ddp}"
        )


def _keep_for_backward(model: nn.Module, args: Any) -> None:
    """Gathered weights are kept where a backward pass follows; without one nothing would give them back."""
    assert isinstance(model, FSDPModule)
    model.set_reshard_after_forward(not torch.is_grad_enabled())


# --------------------------------------------------------------------------------------------------
# Parts


def _part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _part_like(own: DTensor, whole: Tensor) -> DTensor:
    """This process's part of `whole`, which has the shape of `own`; of the type of `whole`, where `own` is."""
    part: Any = torch.empty_like(own.detach(), dtype=whole.dtype)
    part.to_local().copy_(_rows(own.device_mesh, own.placements, whole))
    assert isinstance(part, DTensor)
    return part


def _rows(mesh: DeviceMesh, placements: Any, whole: Tensor) -> Tensor:
    """What of `whole` belongs to this process; the last ones may have nothing."""
    for number, placement in enumerate(placements):
        if isinstance(placement, Shard):
            parts = whole.chunk(mesh.size(number), dim=placement.dim)
            place = mesh.get_local_rank(number)
            whole = parts[place] if place < len(parts) else whole.narrow(placement.dim, 0, 0)
    return whole


def _take_parts(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """Put parts in the place of whole weights, right before a module takes them."""
    for name, own in module.named_parameters(recurse=False):
        whole = state.get(prefix + name)
        if not isinstance(own, DTensor) or not isinstance(whole, Tensor) or isinstance(whole, DTensor):
            continue
        if whole.shape == own.shape:  # torch says what is wrong with another
            state[prefix + name] = _part_like(own, whole)


def _parts_of_state(optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state in which numbers of the shape of their parameter are parts as it is."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    owners = dict(zip(numbers, parameters, strict=True))
    parted = {
        number: {key: _as_owned(value, owners[number]) for key, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": parted}


def _as_owned(value: Any, owner: Tensor) -> Any:
    if isinstance(owner, DTensor) and isinstance(value, Tensor) and value.shape == owner.shape:
        return _part_like(owner, value)
    return value
