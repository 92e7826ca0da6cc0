"""Everything that a resume needs, copied to host memory, so that it can be written while training goes on.

The files are those of transformers' Trainer (`optimizer.pt`, `scheduler.pt`, `scaler.pt`, `rng_state.pth`,
`trainer_state.json`), so its own loading reads them. What a model's files are is its method's business.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

State = dict[str, Any]
Whole = Callable[[Tensor], Tensor]
"""What this process holds of a tensor -> all of it."""


def itself(tensor: Tensor) -> Tensor:
    """Where every process holds whole tensors."""
    return tensor


class HostCopies:
    """Copies of tensors in host memory, pinned where they come from a GPU.

    The buffers are used again by the next snapshot: fresh memory would be given page by page while the loop
    waits. Tensors that share memory (tied weights) share their copy.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._used: set[str] = set()

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of `tensor` under `name`; complete only after `finish` where it comes from a GPU."""
        self._used.add(name)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(
                tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.device.type == "cuda"
            )
            self._buffers[name] = buffer
        return buffer.copy_(tensor.detach(), non_blocking=True)

    def tree(self, name: str, value: Any, whole: Whole = itself, *, keep: bool = True) -> Any:
        """`value` (dictionaries, lists, tuples, plain values) with every tensor in it copied.

        `whole` completes what is a part; every process calls this where it does, and those that do not `keep` it copy
        nothing.
        """
        if isinstance(value, Tensor):
            complete = whole(value)
            return self.copy(name, complete) if keep else None
        if isinstance(value, Mapping):
            return {key: self.tree(f"{name}.{key}", item, whole, keep=keep) for key, item in value.items()}
        if isinstance(value, list | tuple):
            items = (self.tree(f"{name}.{index}", item, whole, keep=keep) for index, item in enumerate(value))
            return type(value)(items)
        return copy.deepcopy(value)

    def finish(self) -> None:
        """Wait for copies from a GPU; give back buffers of what is gone: an optimizer may change what it keeps."""
        self._buffers = {name: buffer for name, buffer in self._buffers.items() if name in self._used}
        self._used = set()
        if torch.cuda.is_available():
            torch.cuda.synchronize()


@dataclass(frozen=True, slots=True)
class ModelState:
    """A state dict in which all that can change is a copy, and the names of what trains."""

    tensors: dict[str, Tensor]
    trained: frozenset[str]


def model_state(
    model: nn.Module, copies: HostCopies, optimizer: Any = None, whole: Whole = itself, *, keep: bool = True
) -> ModelState:
    """The model's state dict: what can change is copied, frozen parameters are the model's own tensors.

    Parameters of `optimizer` can change, though it may have frozen them for a while. Where tensors are parts, `whole`
    completes them, on every process; the frozen ones are copies then too, but for those of an adapter's base, which no
    file holds, and those that do not `keep` get nothing.
    """
    groups = [] if optimizer is None else optimizer.param_groups
    optimized = {id(parameter) for group in groups for parameter in group["params"]}
    seen: dict[Any, Tensor] = {}
    tensors, trained = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        # Parts of ZeRO-3 have no memory of their own to be told apart by.
        key = id(tensor) if whole is not itself else (tensor.data_ptr(), tensor.shape)
        trains = tensor.requires_grad or id(tensor) in optimized
        if trains:
            trained.add(name)
        if whole is not itself and not trains and _of_base(model, name, tensor):
            continue
        if key not in seen:
            complete = whole(tensor)
            if not keep:
                seen[key] = tensor
                continue
            frozen = isinstance(tensor, nn.Parameter) and not trains and complete is tensor
            seen[key] = tensor.detach() if frozen else copies.copy(f"model.{name}", complete)
        tensors[name] = seen[key]
    tensors = tensors if keep else {}
    return ModelState(tensors, frozenset(trained))


def _of_base(model: nn.Module, name: str, tensor: Tensor) -> bool:
    """Whether a frozen tensor belongs to the model below an adapter, and not to the adapter."""
    if not isinstance(model, PeftModel) or not isinstance(tensor, nn.Parameter):
        return False
    prefix = getattr(model.base_model, "prefix", "")  # without one, nothing can be told apart by its name
    return not any(mark in name for mark in (prefix, "modules_to_save", "trainable_tokens"))


def random_state() -> State:
    """The state of all generators that training draws from, as transformers saves it."""
    state: State = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.random.get_rng_state()
    return state


def restore_random(state: Mapping[str, Any]) -> None:
    """Go on drawing from where `random_state` was."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.random.set_rng_state(state["cuda"])


def random_file(folder: Path, rank: int) -> Path | None:
    """The state of process `rank` in a checkpoint of however many; None where it was of fewer."""
    names = (f"rng_state_{rank}.pth", *(["rng_state.pth"] if rank == 0 else []))
    return next((folder / name for name in names if (folder / name).is_file()), None)


@dataclass(frozen=True, slots=True)
class TrainingState:
    """Optimizer, schedule, loss scaler and generators at one moment, in host memory."""

    optimizer: State
    """As torch has it, or with names in the place of its tensors, which are written as parts."""
    scheduler: State
    scaler: State | None
    generators: Sequence[State]
    """Of each process."""

    def write(self, folder: Path) -> None:
        torch.save(self.optimizer, folder / "optimizer.pt")
        with warnings.catch_warnings():
            # The schedule's reminder to save the optimizer too, which was done one line above.
            warnings.filterwarnings("ignore", message="Please also save or load the state of the optimizer")
            torch.save(self.scheduler, folder / "scheduler.pt")
        if self.scaler is not None:
            torch.save(self.scaler, folder / "scaler.pt")
        for rank, state in enumerate(self.generators):
            number = "" if len(self.generators) == 1 else f"_{rank}"
            torch.save(state, folder / f"rng_state{number}.pth")


def training_state(
    optimizer: State, scheduler: Any, scaler: Any, generators: Sequence[State] = ()
) -> TrainingState:
    """What the optimizer's companions hold, beside `optimizer`, a copy of what it holds itself; `generators` are those
    of several processes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Please also save or load the state of the optimizer")
        schedule = copy.deepcopy(scheduler.state_dict())
    return TrainingState(
        optimizer=optimizer,
        scheduler=schedule,
        scaler=None if scaler is None else dict(scaler.state_dict()),
        generators=generators or [random_state()],
    )


def num_bytes(*trees: Any) -> int:
    """Bytes of all tensors in the trees, shared memory counted once."""
    sizes: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            sizes[value.data_ptr()] = value.numel() * value.element_size()
        elif isinstance(value, Mapping):
            for item in value.values():
                visit(item)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)

    for tree in trees:
        visit(tree)
    return sum(sizes.values())
