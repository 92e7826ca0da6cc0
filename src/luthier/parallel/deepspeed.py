"""Optimizer, gradients and weights divided among the processes by DeepSpeed's ZeRO (Rajbhandari et al., 2020,
arXiv:1910.02054).

`deepspeed.initialize` gets the recipe's own optimizer and divides it; the recipe's own schedule moves its learning
rates. Weights are float32 and computed with under autocast, as in a single process. A pass of a step is a backward
before DeepSpeed's boundary of accumulation; the last one is at it. Gradients are averaged over processes and clipped by
the engine, by the norm that was judged before. Weights (ZeRO-3) are divided after the model was loaded whole.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from peft import PeftModel
from torch import Tensor, nn

from luthier.parallel.strategy import State
from luthier.types import CheckpointError, ModelError

ACCUMULATION = 2
"""Passes of a step that DeepSpeed is told of. Where it is more than one, gradients that are kept in the host's memory
are added up over passes; how many there are is told by the boundary alone."""


class DeepSpeed:
    """ZeRO 1, 2 or 3 of one model; `config` is DeepSpeed's JSON without batch sizes."""

    name = "deepspeed"
    shards = True
    loads_on_host = False
    writes_parts = False
    copies = 1

    def __init__(self, config: Mapping[str, Any], processes: int) -> None:
        self._config = dict(config)
        self._processes = processes
        self.stage: int = config["zero_optimization"]["stage"]
        self._engine: Any = None
        self._groups: list[tuple[State, list[nn.Parameter]]] = []
        self._parts: dict[int, tuple[Tensor, nn.Parameter, str]] = {}

    # ---- the model ---------------------------------------------------------------------------------

    def divide(self, model: nn.Module) -> None:
        """Nothing: DeepSpeed divides model and optimizer together, in `wrap`."""

    def wrap(self, accelerator: Accelerator, model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
        """Raises ModelError where weights that train are not float32, and for a head that ZeRO-3 cannot divide."""
        if self._engine is None:
            _require_float32(model)
            deepspeed = _library(accelerator.device.type)
            self._groups = [(group, list(group["params"])) for group in optimizer.param_groups]
            # Autocast goes inside: the engine takes off what is around itself.
            inner = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
            if not torch.distributed.is_initialized():  # one process that nobody launched
                backend = "gloo" if accelerator.device.type == "cpu" else None
                store = torch.distributed.HashStore()  # type: ignore[attr-defined]
                os.environ.setdefault("LOCAL_RANK", "0")
                torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
            if self.stage == 3:
                _require_plain_head(model)
            self._engine, *_ = deepspeed.initialize(
                model=inner, optimizer=optimizer, config=self._complete(model), dist_init_required=False
            )
        return self._engine, _Steps(self._engine)

    def _complete(self, model: nn.Module) -> State:
        """The configuration with batch sizes, and with the sizes that only the model knows."""
        hidden = model.config.get_text_config().hidden_size  # type: ignore[union-attr, operator]
        # As transformers fills them in.
        sizes = {
            "reduce_bucket_size": hidden * hidden,
            "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
            "stage3_param_persistence_threshold": 10 * hidden,
        }
        zero = {
            name: sizes.get(name, "auto") if value == "auto" else value
            for name, value in self._config["zero_optimization"].items()
        }
        whole = _without_auto({**self._config, "zero_optimization": zero})
        assert isinstance(whole, dict)
        return whole | {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": ACCUMULATION,
            "train_batch_size": ACCUMULATION * self._processes,
        }

    def wrapped(self, model: nn.Module) -> str:
        return f"{type(model).__name__}, ZeRO-{self._engine.zero_optimization_stage()}"

    # ---- a step ------------------------------------------------------------------------------------

    def synchronizing(
        self, accelerator: Accelerator, model: nn.Module, *, last: bool
    ) -> AbstractContextManager[Any]:
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, accelerator: Accelerator, model: nn.Module, loss: Tensor, *, last: bool) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def clip(self, accelerator: Accelerator, model: nn.Module, max_norm: float) -> Tensor:
        """The norm of the gradients, infinite where one of them is not a number. The engine clips as it steps."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        zero = self._engine.optimizer
        norm: Tensor = (
            combine_grad_norm_groups(zero._get_norm_groups())
            if self.stage == 3
            else zero.scaled_global_norm()
        )
        return norm

    # ---- files -------------------------------------------------------------------------------------

    def whole(self, tensor: Tensor) -> Tensor:
        if (part := self._parts.get(id(tensor))) is not None:
            from deepspeed.utils import safe_get_full_optimizer_state

            _, parameter, name = part
            found: Tensor = safe_get_full_optimizer_state(parameter, name)
            return found
        if not hasattr(tensor, "ds_id"):
            return tensor
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([tensor]):
            return tensor.detach().clone()

    @contextmanager
    def editing(self, model: nn.Module) -> Iterator[None]:
        if self._engine is None:  # a model that was only just loaded
            yield
            return
        from deepspeed.runtime.zero import GatheredParameters

        # Every process writes the same; that of the first one is taken.
        with GatheredParameters(list(model.parameters()), modifier_rank=0, enabled=self.stage == 3):
            yield
        self._engine.optimizer.refresh_fp32_params()

    def optimizer_state(self, optimizer: Any) -> State:
        state, groups, number = dict[int, State](), list[State](), 0
        self._parts = {}
        self._link()
        for group, parameters in self._groups:
            last = number + len(parameters)
            plain = {name: value for name, value in group.items() if name != "params"}
            groups.append({**plain, "params": list(range(number, last))})
            for index, parameter in enumerate(parameters, start=number):
                if entry := self._entry(parameter):
                    state[index] = entry
            number = last
        return {"state": state, "param_groups": groups}

    def _entry(self, parameter: nn.Parameter) -> State:
        """What the optimizer keeps for it, with a mark for `whole` in the place of what is divided."""
        flat, entry = self._flat(parameter), State()
        for name, value in self._engine.optimizer.optimizer.state.get(flat, {}).items():
            if isinstance(value, Tensor) and value.shape == flat.shape:
                mark = torch.empty(0)
                self._parts[id(mark)] = (mark, parameter, name)
                entry[name] = mark
            else:
                entry[name] = value
        return entry

    def _flat(self, parameter: nn.Parameter) -> Tensor:
        """This process's part of the group, or of the piece of it, that the parameter is in."""
        zero = self._engine.optimizer
        if self.stage == 3:
            piece: Tensor = zero.fp32_partitioned_groups_flat[
                zero.grad_position[zero.get_param_id(parameter)][0]
            ]
            return piece
        part: Tensor = zero.single_partition_of_fp32_groups[zero._get_param_group_idx(parameter)]
        return part

    def _link(self) -> None:
        """Let DeepSpeed look up which numbers of the optimizer are whose. It does so in the first step, right after
        its first group, when there are none of the other groups yet."""
        if self.stage < 3:
            zero = self._engine.optimizer
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def load_optimizer(self, optimizer: Any, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError where the state is of other parameters."""
        sizes = [len(parameters) for _, parameters in self._groups]
        if [len(group["params"]) for group in state["param_groups"]] != sizes:
            raise CheckpointError(
                "the checkpoint's optimizer.pt is of other parameter groups than this run has"
            )
        entries, own = state["state"], self._engine.optimizer.optimizer.state
        placed: list[tuple[nn.Parameter, str, Tensor]] = []
        for (group, parameters), saved in zip(self._groups, state["param_groups"], strict=True):
            group |= {name: value for name, value in saved.items() if name != "params"}
            for number, parameter in zip(saved["params"], parameters, strict=True):
                shape, flat = getattr(parameter, "ds_shape", parameter.shape), self._flat(parameter)
                for name, value in entries.get(number, {}).items():
                    if isinstance(value, Tensor) and value.shape == shape:
                        own[flat].setdefault(name, torch.zeros_like(flat))
                        placed.append((parameter, name, value))
                    elif isinstance(value, Tensor):
                        own[flat][name] = value.to(flat.device) if group.get("fused") else value.clone()
                    else:
                        own[flat][name] = value
        self._place(placed)

    def _place(self, placed: list[tuple[nn.Parameter, str, Tensor]]) -> None:
        """Put this process's part of each whole number of the optimizer where it belongs."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.stage < 3:
            self._link()
            for parameter, name, value in placed:
                safe_set_full_optimizer_state(parameter, value, name)
            return
        rank = torch.distributed.get_rank()
        for parameter, name, value in placed:
            size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            part = value.flatten()[rank * size : (rank + 1) * size]
            # The last parts are filled up with zeros.
            safe_set_local_optimizer_state(parameter, nn.functional.pad(part, (0, size - len(part))), name)


class _Steps(AcceleratedOptimizer):  # type: ignore[misc]
    """The recipe's optimizer as the loop sees it; a step of it is the engine's."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine.basic_optimizer, device_placement=False)
        self._engine = engine
        self._is_accelerate_prepared = True

    def step(self, closure: None = None) -> None:
        self._engine.step()

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """The engine did it after its step."""


# --------------------------------------------------------------------------------------------------
# Beginning


def _library(device: str) -> Any:
    """The package, told which device to work on before it looks for one, and quiet."""
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # It calls functions of torch by names that have changed since.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device == "cpu":
        # No operators of its own: that for processes of one machine would be compiled for a minute to replace gloo.
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def _require_float32(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise ModelError(
                f"parallel: deepspeed with {name} in {str(parameter.dtype).removeprefix('torch.')}: weights that "
                "train are float32 here, and train.precision: bf16 computes in 16 bits; give model.dtype: float32, or "
                "model.upcast_trained where the others are to stay 16-bit"
            )


def _require_plain_head(model: nn.Module) -> None:
    """The output head is called once, and what is inside of it once for each chunk of targets, of which processes have
    different numbers; DeepSpeed would gather its weights as often on each."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if isinstance(head, nn.Module) and next(head.children(), None) is not None:
        raise ModelError(
            "parallel: deepspeed with zero: 3 does not go with an adapter on the output head, or a copy of it that "
            "trains; give zero: 2, or leave the head out of method.targets and method.modules_to_save"
        )


def _without_auto(value: Any) -> Any:
    """Where nobody knows better, DeepSpeed's own defaults hold."""
    if isinstance(value, dict):
        return {name: _without_auto(item) for name, item in value.items() if item != "auto"}
    return value
