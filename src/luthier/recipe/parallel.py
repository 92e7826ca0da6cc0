"""How several processes train one model together."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from luthier.recipe.base import Spec


class _Processes(Spec):
    """What every strategy says of the processes themselves."""

    shards: ClassVar[bool] = False
    """Whether each process holds only a part of the weights, gradients or optimizer."""

    processes: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    """Processes on each machine; `auto` is one for each visible GPU, and one without GPUs."""
    nodes: int = Field(default=1, gt=0)
    """Machines."""
    max_restarts: int = Field(default=0, ge=0)
    """How often all processes are started again, from the newest valid checkpoint, after one of them failed."""
    timeout: int = Field(default=1800, gt=0)
    """Seconds that a process waits for the others before the run ends."""


class DdpSpec(_Processes):
    """Each process holds the whole model; gradients are averaged (torch's DistributedDataParallel)."""

    type: Literal["ddp"] = "ddp"


class Fsdp2Spec(_Processes):
    """Weights, gradients and optimizer are divided among the processes (torch's fully_shard, FSDP2)."""

    shards: ClassVar[bool] = True

    type: Literal["fsdp2"] = "fsdp2"
    reshard_after_forward: bool = True
    """Give back the gathered weights of a layer after its forward (ZeRO-3), or keep them for its backward (ZeRO-2)."""
    cpu_offload: bool = False
    """Keep parts of weights, gradients and optimizer in the host's memory."""
    param_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type in which weights are gathered and computed with; absent: that of the weights, under `train.precision`'s
    autocast."""
    reduce_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type in which gradients are added up; absent: that of the gradients."""
    state: Literal["full", "sharded"] = "full"
    """Checkpoints hold the optimizer whole (one file, gathered in the first process's memory), or as each process's
    part (torch's distributed checkpoint). Both are read by any number of processes; weights are always whole."""
    tensor: int = Field(default=1, gt=0)
    """Processes that share each layer's matrices (tensor parallelism); the others divide what is left."""


class DeepSpeedSpec(_Processes):
    """DeepSpeed's ZeRO."""

    shards: ClassVar[bool] = True

    type: Literal["deepspeed"] = "deepspeed"
    zero: Literal[1, 2, 3] | None = None
    """What is divided: the optimizer (1), gradients too (2), weights too (3). 2 if neither this nor `config` says."""
    offload_optimizer: bool = False
    """Keep the optimizer in the host's memory."""
    offload_parameters: bool = False
    """Keep weights in the host's memory (zero: 3)."""
    config: str | dict[str, Any] | None = None
    """DeepSpeed's own JSON, as a path or in place. Keys that the recipe decides must be `auto` or equal to it."""


ParallelSpec = Annotated[DdpSpec | Fsdp2Spec | DeepSpeedSpec, Field(discriminator="type")]
