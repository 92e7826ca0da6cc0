"""How the model is held by several processes, and all that the loop has to know of it.

Files know nothing of it: a checkpoint is what a single process would have written, so any number of processes under any
strategy reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from accelerate import Accelerator
from torch import Tensor, nn

State = dict[str, Any]


class Strategy(Protocol):
    """Methods marked *together* are called by all processes, in the same order."""

    name: str
    shards: bool
    """Whether parameters of the loop's model, or its optimizer's numbers, may be parts of whole ones."""

    writes_parts: bool
    """Whether each process writes its own part of the optimizer to a checkpoint, which else holds it whole."""

    copies: int
    """How many processes, neighbours by number, have the same rows."""

    loads_on_host: bool
    """Whether a model is loaded to the host's memory, because `divide` brings its parts to the device."""

    def divide(self, model: nn.Module) -> None:
        """Divide a whole, loaded model among the processes, before its optimizer and its reference are built.
        *Together.*"""
        ...

    def wrap(self, accelerator: Accelerator, model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
        """What the loop calls in place of a model, and steps in place of its optimizer: both as they are where nothing
        but DistributedDataParallel has to be put around them. *Together.*"""
        ...

    def wrapped(self, model: nn.Module) -> str:
        """The class that holds the model for several processes, for `run.json`: asked for when training begins."""
        ...

    def synchronizing(
        self, accelerator: Accelerator, model: nn.Module, *, last: bool
    ) -> AbstractContextManager[Any]:
        """Around forward and backward of one pass: gradients are exchanged in the `last` pass of a step only."""
        ...

    def backward(self, accelerator: Accelerator, model: nn.Module, loss: Tensor, *, last: bool) -> None:
        """Gradients of one pass."""
        ...

    def clip(self, accelerator: Accelerator, model: nn.Module, max_norm: float) -> Tensor:
        """Scale the gradients down to `max_norm`, which may be infinite; their norm before. *Together.*"""
        ...

    def whole(self, tensor: Tensor) -> Tensor:
        """A parameter, buffer or number of the optimizer as a single process would hold it. *Together.*"""
        ...

    def editing(self, model: nn.Module) -> AbstractContextManager[Any]:
        """In it, `load_state_dict` of the model takes whole weights (resume, load_best, rewind). *Together.*"""
        ...

    def optimizer_state(self, optimizer: Any) -> State:
        """`optimizer.state_dict()` as a single process would have it, except that tensors may be parts that `whole`
        completes. *Together.*"""
        ...

    def load_optimizer(self, optimizer: Any, state: Mapping[str, Any]) -> None:
        """Put in what a single process's `optimizer.state_dict()` would have been. *Together.*"""
        ...


def may_idle(model: nn.Module) -> bool:
    """Whether a pass may leave out some of what trains: experts that no token is sent to, towers without media, a
    critic beside the policy. DistributedDataParallel then has to look for it in each pass.

    A parameter that no process used keeps no gradient at all, as in one process. To send an empty image through a tower
    instead would make its gradient zero, which an optimizer with moments takes for a step.
    """
    config: Any = getattr(model, "config", None)
    if config is not None and config.get_text_config() is not config:
        return True
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return not names.isdisjoint(_PARTS) or any(getattr(config, key, None) for key in _COUNTS)


_PARTS = {"experts", "router", "critic"}
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class Replicated:
    """Every process holds all of the model: one process alone, or DistributedDataParallel, which accelerate wraps."""

    name = "ddp"
    shards = False
    writes_parts = False
    copies = 1
    loads_on_host = False

    def divide(self, model: nn.Module) -> None:
        return None

    def wrap(self, accelerator: Accelerator, model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
        return model, optimizer

    def wrapped(self, model: nn.Module) -> str:
        return type(model).__name__

    def synchronizing(
        self, accelerator: Accelerator, model: nn.Module, *, last: bool
    ) -> AbstractContextManager[Any]:
        return nullcontext() if last else accelerator.no_sync(model)

    def backward(self, accelerator: Accelerator, model: nn.Module, loss: Tensor, *, last: bool) -> None:
        accelerator.backward(loss)

    def clip(self, accelerator: Accelerator, model: nn.Module, max_norm: float) -> Tensor:
        norm: Tensor = accelerator.clip_grad_norm_(model.parameters(), max_norm)
        return norm

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor

    def editing(self, model: nn.Module) -> AbstractContextManager[Any]:
        return nullcontext()

    def optimizer_state(self, optimizer: Any) -> State:
        state: State = optimizer.state_dict()
        return state

    def load_optimizer(self, optimizer: Any, state: Mapping[str, Any]) -> None:
        optimizer.load_state_dict(state)
