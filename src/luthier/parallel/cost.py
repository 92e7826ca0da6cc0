"""What a strategy costs each process, from formulae: bytes that it holds, bytes that it sends in an optimizer step.

Notation: W weights, G gradients and O optimizer of the whole model; L the weights of the largest group that is gathered
at once; N processes; P passes of a step; T the weights that train.

Rings: to gather or to scatter S bytes, each process sends S (N - 1) / N; to add them up everywhere it does both
(Patarasuk & Yuan, 2009). What is divided is that of ZeRO (Rajbhandari et al., 2020, arXiv:1910.02054) and FSDP (Zhao et
al., 2023, arXiv:2304.11277). Numbers of the optimizer are divided evenly here; real parts differ by a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from luthier.recipe.parallel import DdpSpec, DeepSpeedSpec, Fsdp2Spec, ParallelSpec, TensorSpec

BUCKET = 4 * 500_000_000
"""Bytes of gradients that DeepSpeed adds up at once: its `reduce_bucket_size` at the default, in float32."""


@dataclass(frozen=True, slots=True)
class Whole:
    """Bytes of a whole model. `group`: the weights of the largest layer, or of embeddings and head where they are
    gathered together. `trained`: the weights of what trains. `outside`: the weights that tensor parallelism leaves
    whole, which are embeddings and head. `hidden`: what enters all layers in one pass."""

    weights: int
    gradients: int
    optimizer: int
    group: int
    trained: int
    outside: int = 0
    hidden: int = 0


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes on each process's device. `gathered`: whole weights that are there for a while. `exchanged`: gradients that
    are on their way beside those that are kept."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int = 0
    exchanged: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.gathered + self.exchanged


def zero_stage(spec: ParallelSpec) -> int:
    """What is divided: nothing (0), the optimizer (1), gradients too (2), weights too (3)."""
    if isinstance(spec, DdpSpec | TensorSpec):
        return 0
    if isinstance(spec, Fsdp2Spec):
        return 3
    return spec.zero or 2


def held(spec: ParallelSpec, processes: int, whole: Whole) -> Held:
    """What each of `processes` holds of the model between and in its passes, without activations."""
    if processes == 1:
        return Held(whole.weights, whole.gradients, whole.optimizer)
    if isinstance(spec, TensorSpec):
        group, inside = spec.group or processes, 1 - whole.outside / whole.weights
        sizes = (whole.weights, whole.gradients, whole.optimizer)
        return Held(*(round(size * (1 - inside + inside / group)) for size in sizes))
    stage, part = zero_stage(spec), partial(_part, processes=processes)
    optimizer = part(whole.optimizer) if stage >= 1 else whole.optimizer
    if stage == 0:
        # Gradients are copied into buckets, which are sent.
        return Held(whole.weights, whole.gradients, whole.optimizer, exchanged=whole.gradients)
    if stage < 3:
        gradients = part(whole.gradients) if stage == 2 else whole.gradients
        off = isinstance(spec, DeepSpeedSpec) and spec.offload_optimizer
        return Held(whole.weights, gradients, 0 if off else optimizer, exchanged=min(BUCKET, whole.gradients))
    share = whole.trained / whole.weights if whole.weights else 0.0
    on_host = isinstance(spec, Fsdp2Spec) and spec.cpu_offload
    if isinstance(spec, DeepSpeedSpec):
        on_host = spec.offload_parameters
    if isinstance(spec, Fsdp2Spec) and not spec.reshard_after_forward:
        gathered = whole.weights
    else:
        gathered = 2 * whole.group  # the next one comes while this one computes
    return Held(
        0 if on_host else part(whole.weights),
        0 if on_host else part(whole.gradients),
        0 if on_host or (isinstance(spec, DeepSpeedSpec) and spec.offload_optimizer) else optimizer,
        gathered,
        exchanged=round(whole.group * share),
    )


def sent(spec: ParallelSpec, processes: int, whole: Whole, passes: int = 1) -> int:
    """Bytes that each process sends in one optimizer step of `passes` passes."""
    stage, ring = zero_stage(spec), (processes - 1) / processes
    if isinstance(spec, TensorSpec):
        # Forward adds up behind attention and MLP; backward behind each of the five matrices that divide their outputs.
        group = spec.group or processes
        exchanged = passes * 7 * whole.hidden * (group - 1) / group
        groups = processes // group
        return round(2 * (exchanged + held(spec, processes, whole).gradients * (groups - 1) / groups))
    if stage == 0:
        return round(2 * whole.gradients * ring)
    if stage == 1:
        # Gradients are summed once; each process then gives its part of the new weights to all.
        return round((whole.gradients + whole.trained) * ring)
    if stage == 2:
        return round((passes * whole.gradients + whole.trained) * ring)
    keeps = isinstance(spec, Fsdp2Spec) and not spec.reshard_after_forward
    gathered = (1 if keeps else 2) * whole.weights
    return round(passes * (gathered + whole.gradients) * ring)


def _part(size: int, *, processes: int) -> int:
    return -(-size // processes)
