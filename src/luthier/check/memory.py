"""The memory that a run will take at its fullest, part by part, without training.

Weights, gradients and optimizer states are counted from the tensors themselves. Activations are what autograd keeps
for backward: they are counted in three short forward passes on the real model, through which a parabola goes exactly,
because every saved tensor grows with the tokens, with the square of a segment's length, or not at all. What the head
needs follows from the chunks of `model.logprobs`.

A run is fullest either when the backward pass of its longest pass begins, or when that of a full model ends, or
while weights are loaded or saved; `Memory.moments` has all of them, and the total is that of the largest. On a CPU
the memory is that of the process; on a GPU it is the device's.

Bytes everywhere. Shapes: T tokens of a pass, N targets, C rows of a chunk, D hidden size, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from luthier.model.logprobs import ModelPolicy, chunk_rows
from luthier.recipe.schema import OptimSpec, SgdSpec
from luthier.types import IGNORE_INDEX, Batch, Stage

HEAP_LIMIT = 2**25
"""Tensors from this size on are given back to the system at once; smaller ones leave holes in glibc's heap."""
HELD = {"one length": 0.3, "many lengths": 0.9, "recomputed": 0.6}
"""What glibc's heap holds without using it, as a share of the activations: of steps with one pass, with passes of
different lengths, and, with checkpointing, of the activations as they would be without. Measured on Linux with glibc
2.36 (benchmarks/check_memory.py). MALLOC_MMAP_THRESHOLD_=262144 in the environment avoids it, at a price in
speed."""

SMALL_TENSORS = {"cpu": 30 * 2**20, "cuda": 0, "mps": 0}
"""Code and tables of libraries that are first touched by training."""

MEASURED_LENGTH = 128
"""Tokens of the shortest pass that is measured; the others are two and three times as long."""


# --------------------------------------------------------------------------------------------------
# What is counted exactly


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of each piece of memory behind the tensors, by its address; shared memory is there once."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return found


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the values of these tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def weight_bytes(model: nn.Module) -> int:
    """Parameters and buffers, tied ones once."""
    return tensor_bytes(model.parameters()) + tensor_bytes(model.buffers())


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gradient_bytes(model: nn.Module) -> int:
    """A gradient has the shape and type of its parameter."""
    return tensor_bytes(trained(model))


OPTIMIZER_STATES: dict[str, Callable[[Any], tuple[int, int]]] = {
    # two moments of each parameter, and a float32 count of steps
    "adamw": lambda spec: (2, 4),
    "sgd": lambda spec: (1 if isinstance(spec, SgdSpec) and spec.momentum else 0, 0),
}
"""By optimizer: copies of the parameters that it keeps, and bytes beside them for each parameter tensor."""


def optimizer_bytes(spec: OptimSpec, parameters: Sequence[Tensor]) -> int:
    """What the optimizer keeps between steps for these parameters."""
    copies, beside = OPTIMIZER_STATES[spec.type](spec)  # type: ignore[attr-defined]
    return copies * tensor_bytes(parameters) + beside * len(parameters)


# --------------------------------------------------------------------------------------------------
# Activations


class SavedTensors(saved_tensors_hooks):
    """Counts the memory that autograd keeps for backward inside the block, each piece once.

    known: tensors that are there anyway (weights, buffers). Pieces are held until `release`, so that no address is
    used twice.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        self._known = storages(known)
        self._found: dict[int, torch.UntypedStorage] = {}
        super().__init__(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._found[storage.data_ptr()] = storage
        return tensor

    def release(self) -> list[int]:
        """The bytes of each piece; they are let go."""
        sizes = [storage.nbytes() for storage in self._found.values()]
        self._found.clear()
        return sizes


@dataclass(frozen=True, slots=True)
class Growth:
    """constant + per_token T + per_square (sum of the squared lengths of the segments), in bytes."""

    constant: float
    per_token: float
    per_square: float = 0.0

    @classmethod
    def through(cls, length: int, values: Sequence[int]) -> Growth:
        """The parabola through the bytes of one segment of `length`, 2 `length` and 3 `length` tokens."""
        one, two, three = values
        square = (one - 2 * two + three) / (2 * length**2)
        token = (two - one) / length - 3 * length * square
        return cls(one - token * length - square * length**2, token, square)

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
    model: nn.Module, stage: Stage, arithmetic: torch.dtype | None, longest: int = 3 * MEASURED_LENGTH
) -> Activations:
    """What autograd keeps of three passes of at most `longest` tokens.

    The passes have no targets, so what the head needs is not in them. A sliding window wider than them is not seen.
    """
    device = next(model.parameters()).device
    length = max(2, min(longest // 3, MEASURED_LENGTH))
    measured = [_saved(model, stage, arithmetic, device, factor * length) for factor in (1, 2, 3)]
    growth = Growth.through(length, [sum(pieces) for pieces in measured])
    return Activations(growth, 3 * length, tuple(measured[-1]))


def _saved(
    model: nn.Module, stage: Stage, arithmetic: torch.dtype | None, device: torch.device, length: int
) -> list[int]:
    batch = _one_segment(length, model.config.get_text_config().vocab_size, device)  # type: ignore[union-attr, operator]
    training = model.training
    model.train()
    saved = SavedTensors([*model.parameters(), *model.buffers()])
    try:
        with torch.autocast(device.type, dtype=arithmetic, enabled=arithmetic is not None), saved:
            loss = stage.loss(ModelPolicy(model), batch)
        del loss
        return saved.release()
    finally:
        model.train(training)


def _one_segment(length: int, vocab_size: int, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        input_ids=torch.randint(0, vocab_size, (1, length), generator=generator),
        position_ids=torch.arange(length)[None],
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
        targets=torch.full((length,), IGNORE_INDEX),
        target_weights=torch.zeros(length),
        parent=torch.full((1,), -1),
        max_length=length,
    ).to(device)


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
    """One pass through the model: its positions (padding included), the sum of the squared lengths of its rows, and
    its targets."""

    positions: int
    squares: int
    targets: int


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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"total": self.total, "fits": self.fits}


PARTS = {
    "process": "Python, libraries and data",
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer states",
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
    weight files whose type is not that of the weights, `copied` what a checkpoint copies to host memory.
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


def at_its_fullest(sizes: Sizes, limit: int, *, several_passes: bool, copies_remain: bool) -> Memory:
    """The moments of a run, and the parts of the largest.

    several_passes: a step has more than one pass, so gradients are there when the last one's backward begins.
    copies_remain: a checkpoint was copied before training ends, and its buffers stay.
    """
    base = {"process": sizes.process, "weights": sizes.weights}
    kept = {**base, "optimizer": sizes.optimizer}
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
    totals = {name: sum(parts.values()) for name, parts in moments.items()}
    fullest = max(totals, key=lambda name: totals[name])
    parts = {name: moments[fullest].get(name, 0) for name in PARTS}
    return Memory({name: size for name, size in parts.items() if size}, totals, fullest, limit)
