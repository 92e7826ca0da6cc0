"""The memory that a run will take at its fullest, part by part, without training.

Weights, gradients and optimizer states are counted from the tensors themselves. Activations are what autograd keeps
for backward: they are counted in three short forward passes on the real model, through which a parabola goes exactly,
because every saved tensor grows with the tokens, with the square of a segment's length, or not at all. What the head
needs follows from the chunks of `model.kernel`; a value head needs next to nothing.

Of a reference model the weights are counted, or the copy that is swapped in for the policy's. Its forward pass, like
those of a step's statistics (`Stage.observe`), keeps nothing for backward: what it needs for a moment is taken to be no
more than what backward needs of one layer and of the head, and is not added. That was not measured.

A run is fullest either when the backward pass of its longest pass begins, or when that of a full model ends, or
while weights are loaded or saved; `Memory.moments` has all of them, and the total is that of the largest. On a CPU
the memory is that of the process; on a GPU it is the device's.

Bytes everywhere. Shapes: T tokens of a pass, N targets, C rows of a chunk, D hidden size, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from luthier.check.saved import saved_of
from luthier.data.collate import branch_batch, flat_batch
from luthier.model.kernel import chunk_rows
from luthier.model.logprobs import ModelPolicy
from luthier.model.quantized_layers import stored_bytes
from luthier.model.reference import OtherModel, Reference, StartingPoint
from luthier.optim.state_size import gradients_at_once
from luthier.recipe.schema import OptimSpec
from luthier.types import IGNORE_INDEX, Batch, ModelKind, Sample

HEAP_LIMIT = 2**25
"""Tensors from this size on are given back to the system at once; smaller ones leave holes in glibc's heap."""
HELD = {"one length": 0.3, "many lengths": 0.9, "recomputed": 0.6}
"""What glibc's heap holds without using it, as a share of the activations: of steps with one pass, with passes of
different lengths, and, with checkpointing, of the activations as they would be without. Measured on Linux with glibc
2.36 (benchmarks/check_memory.py). MALLOC_MMAP_THRESHOLD_=262144 in the environment avoids it, at a price in
speed."""

ROUGH_FROM, MOST_HELD = 0.15, 1.8
"""The share of the heap in the sum from which on the estimate is called rough; and what runs held at most, as a
multiple of what was estimated (the same benchmark)."""

SMALL_TENSORS = {"cpu": 30 * 2**20, "cuda": 0, "mps": 0}
"""Code and tables of libraries that are first touched by training."""

MEASURED_LENGTH = 128
"""Tokens of the shortest pass that is measured; the others are two and three times as long."""


# --------------------------------------------------------------------------------------------------
# What is counted exactly


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the values of these tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def weight_bytes(model: nn.Module) -> int:
    """Parameters and buffers, tied ones once."""
    return stored_bytes(model)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gradient_bytes(spec: OptimSpec, model: nn.Module) -> int:
    """A gradient has the shape and type of its parameter. Some optimizers never have all of them at once."""
    return tensor_bytes(gradients_at_once(spec, model))


def reference_bytes(reference: Reference | None, model: nn.Module) -> int:
    """What the reference takes beside the policy: nothing of adapters that are off, a copy of what trains where it is
    the starting point, the weights of another model."""
    if isinstance(reference, StartingPoint):
        return tensor_bytes(trained(model))
    if isinstance(reference, OtherModel):
        with reference.active(model) as other:
            return weight_bytes(other)
    return 0


# --------------------------------------------------------------------------------------------------
# Activations


@dataclass(frozen=True, slots=True)
class Growth:
    """constant + per_token T + per_square (`PassShape.squares`), in bytes."""

    constant: float
    per_token: float
    per_square: float = 0.0

    @classmethod
    def through(cls, shapes: Sequence[PassShape], values: Sequence[int]) -> Growth:
        """The one that gives the bytes of three passes; no two of them are of the same shape."""
        sides = np.array([(1, shape.positions, shape.squares) for shape in shapes], np.float64)
        return cls(*np.linalg.solve(sides, np.array(values, np.float64)).tolist())

    def __call__(self, positions: int, squares: int) -> int:
        return max(0, round(self.constant + self.per_token * positions + self.per_square * squares))


@dataclass(frozen=True, slots=True)
class Activations:
    """How the activations of a model grow, and the pieces that a pass of `length` tokens has."""

    growth: Growth
    length: int
    pieces: tuple[int, ...]

    def heap_share(self, positions: int) -> float:
        """The part of the activations that stands in pieces below HEAP_LIMIT in a pass of so many positions."""
        scale = positions / self.length
        small = sum(size for size in self.pieces if size * scale < HEAP_LIMIT)
        return small / max(sum(self.pieces), 1)


def measure_activations(
    model: nn.Module,
    kind: ModelKind,
    arithmetic: torch.dtype | None,
    longest: int = 3 * MEASURED_LENGTH,
    *,
    pairs: bool = False,
) -> Activations:
    """What autograd keeps of three passes of at most `longest` tokens.

    A pass is one segment; with `pairs` it is a prompt and two answers that continue it, a third of the tokens each.
    It has no targets, so what the head needs is not in it. A sliding window wider than a segment is not seen.
    """
    vocab_size = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    length = max(4, min(longest // 3, MEASURED_LENGTH))
    passes = [_untaught(factor * length, vocab_size, pairs) for factor in (1, 2, 3)]
    measured = [_saved(model, kind, arithmetic, batch) for batch in passes]
    growth = Growth.through([shape_of(batch) for batch in passes], [sum(pieces) for pieces in measured])
    return Activations(growth, passes[-1].num_tokens, tuple(measured[-1]))


def _saved(model: nn.Module, kind: ModelKind, arithmetic: torch.dtype | None, batch: Batch) -> list[int]:
    device, training = next(model.parameters()).device, model.training
    model.train()
    moved, policy = batch.to(device), ModelPolicy(model)
    try:
        with (
            torch.autocast(device.type, dtype=arithmetic, enabled=arithmetic is not None),
            saved_of(model) as saved,
        ):
            answers = policy.scores(moved) if kind == "reward" else policy.logprobs(moved)
        sizes = saved.release()
        del answers
        return sizes
    finally:
        model.train(training)


def _untaught(length: int, vocab_size: int, pairs: bool) -> Batch:
    """A pass of about `length` random tokens without targets."""
    ids = np.random.default_rng(0).integers(0, vocab_size, length, dtype=np.int32)
    third = length // 3
    branches = (length - 2 * third, length - third) if pairs else ()
    sample = Sample(ids, np.zeros(length, np.float32), branches=branches)
    return branch_batch([sample], share_prompts=True) if pairs else flat_batch([sample])


@contextmanager
def without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Inside the block no layer computes its activations again."""
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for layer in layers:
        layer.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class PassShape:
    """One pass through the model. `squares` sums, over its segments, their length times that of what they attend to:
    themselves and the segment that they continue. `positions` and `squares` include padding."""

    positions: int
    squares: int
    targets: int


def shape_of(batch: Batch, *, padded: bool = False) -> PassShape:
    """The shape of a pass; `padded` where each segment becomes a row as long as the longest."""
    lengths_S = batch.cu_seqlens.diff().long()
    targets = int((batch.targets != IGNORE_INDEX).sum())
    if padded:
        rows, longest = len(lengths_S), int(lengths_S.max())
        return PassShape(rows * longest, rows * longest**2, targets)
    before_S = torch.where(batch.parent >= 0, lengths_S[batch.parent.clamp(min=0)], 0)
    return PassShape(batch.num_tokens, int((lengths_S * (lengths_S + before_S)).sum()), targets)


def layer_bytes(plain: Growth, shape: PassShape, num_layers: int, *, checkpointed: bool) -> int:
    """What backward needs beside the saved tensors: gradients of activations, a quarter of what one layer saves (seen
    in a trace of allocations of a Llama), and with checkpointing that layer's activations, computed again."""
    one = plain(shape.positions, shape.squares) / num_layers
    return round(one * (1.25 if checkpointed else 0.25))


def head_bytes(
    model: nn.Module, shape: PassShape, *, arithmetic: torch.dtype | None, smoothed: bool
) -> tuple[int, int]:
    """What the head and the loss keep until backward, and what they need for a moment beside it.

    A head that does not train: the gradient of each target's hidden state is kept; logits and their exponentials of
    one chunk exist at a time. A head that trains: hidden states are kept, logits are computed again in backward with
    their gradients, and the gradient of the weight is summed over chunks: two operands and their sum.
    """
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    weight = head.weight
    assert isinstance(weight, Tensor)
    vocab_size = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    width = (arithmetic or weight.dtype).itemsize
    rows = min(shape.targets, chunk_rows(shape.targets, vocab_size, weight.device))
    kept = shape.targets * weight.shape[-1] * width * (1 + smoothed)
    chunk = rows * vocab_size
    copies = 0 if width == 4 else width  # beside the float32 ones
    if not any(parameter.requires_grad for parameter in head.parameters()):
        return kept, chunk * (8 + copies + 4 * smoothed)
    logits = chunk * (16 + copies + 4 * smoothed)
    gradient = weight.numel() * weight.element_size()
    return kept, max(logits, 3 * gradient) if shape.targets > rows else max(logits, gradient + logits // 2)


# --------------------------------------------------------------------------------------------------
# The sum


@dataclass(frozen=True, slots=True)
class Memory:
    """Estimated bytes. `parts` are those of the fullest moment and sum up to `total`."""

    parts: dict[str, int]
    moments: dict[str, int]
    fullest: str
    limit: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.limit

    @property
    def rough(self) -> str | None:
        """What to say where much of the sum is a guess; None where little is."""
        held = self.parts.get("allocator", 0)
        if held < ROUGH_FROM * self.total:
            return None
        return (
            f"the memory estimate is rough: {held / 2**30:.1f} GiB of it is a guess at what the C library's heap holds "
            f"without use, and measured runs held between nothing and {MOST_HELD} times as much"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"total": self.total, "fits": self.fits}


PARTS = {
    "process": "Python, libraries and data",
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "reference": "reference model",
    "sampling": "keys and values of answers",
    "activations": "activations of the longest pass",
    "logits": "logits and loss, one chunk",
    "workspace": "gradients of activations, one layer",
    "allocator": "held by the allocator, unused",
    "checkpoint": "copy for checkpoints",
    "file": "weights in their file's type",
}
"""The parts of the sum and what people call them."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Every part by itself.

    `transient` is the larger of what the head and a layer's backward need for a moment; `converted` is the size of
    weight files whose type is not that of the weights, `copied` what a checkpoint copies to host memory. `reference`
    stays beside the policy; `asked` is that of a reference that is gone when training begins. `sampling` are the keys
    and values of the answers that are drawn between steps.
    """

    process: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    allocator: int
    head_gradient: int = 0
    copied: int = 0
    converted: int = 0
    reference: int = 0
    asked: int = 0
    sampling: int = 0


def at_its_fullest(sizes: Sizes, limit: int, *, several_passes: bool, copies_remain: bool) -> Memory:
    """The moments of a run, and the parts of the largest.

    several_passes: a step has more than one pass, so gradients are there when the last one's backward begins.
    copies_remain: a checkpoint was copied before training ends, and its buffers stay.
    """
    base = {"process": sizes.process, "weights": sizes.weights}
    kept = {**base, "optimizer": sizes.optimizer, "reference": sizes.reference}
    copies = {"checkpoint": sizes.copied}
    training = kept | (copies if copies_remain else {})
    backward = {"activations": sizes.activations, "logits": sizes.logits}
    backward |= {"workspace": sizes.workspace, "allocator": sizes.allocator}
    moments = {
        "loading": base | {"file": sizes.converted},
        "backward begins": training | backward | {"gradients": sizes.gradients * several_passes},
        "backward ends": training
        | {"gradients": sizes.gradients, "logits": 2 * sizes.head_gradient, "allocator": sizes.allocator},
        "saving": kept | copies | {"allocator": sizes.allocator},
    }
    if sizes.sampling:
        moments["sampling"] = training | {"sampling": sizes.sampling, "allocator": sizes.allocator}
    if sizes.asked:
        moments["asking the reference"] = base | {"reference": sizes.asked}
    totals = {name: sum(parts.values()) for name, parts in moments.items()}
    fullest = max(totals, key=lambda name: totals[name])
    parts = {name: moments[fullest].get(name, 0) for name in PARTS}
    return Memory({name: size for name, size in parts.items() if size}, totals, fullest, limit)
