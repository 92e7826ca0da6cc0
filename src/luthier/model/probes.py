"""What the self-test asks of a model: numbers at the positions of a flat batch, and the same of one sequence alone.

A language model answers with log-probabilities. What is measured of the numbers (`luthier.model.selftest`,
`luthier.model.sharing`) does not depend on what they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from luthier.model.logprobs import ModelPolicy, install_target_forward
from luthier.model.quantized_layers import arithmetic_types
from luthier.model.rows import Rows
from luthier.types import Batch

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}
"""Largest difference of a log-probability, or of a score. A leak moves random tokens by far more than rounding does."""
REACH = 1e-9
"""Largest part of a gradient that may go where none should; isolated segments measured 0 exactly."""


def coarsest(model: nn.Module, kind: torch.dtype) -> torch.dtype:
    """The least exact type that numbers go through: `kind`, or one that quantized layers compute in."""
    return max({kind, *arithmetic_types(model)}, key=TOLERANCE.__getitem__)


class Probe(Protocol):
    """`model` may be a PEFT wrapper wherever it is asked for an answer."""

    outputs: str
    """What the numbers are called in a message, in the plural."""
    unit: str
    """Their unit, with a space before it; empty where they have none."""

    def install(self, model: nn.Module, rows: Rows) -> None:
        """Teach the bare model (not its wrapper) its forward pass of flat batches, laid out as `rows`."""
        ...

    def together(self, model: nn.Module, batch: Batch) -> Tensor:
        """(N,) the number at each supervised position of the batch, in order; differentiable.

        It may depend on the tokens up to that position, and on the target there.
        """
        ...

    def alone(self, model: nn.Module, ids: Tensor) -> Tensor:
        """(L - 1,) the numbers at all positions but the last of one sequence (L,), by the model's ordinary forward."""
        ...


class LanguageProbe:
    """Log-probabilities of the next tokens."""

    outputs = "log-probabilities"
    unit = " nats"

    def install(self, model: nn.Module, rows: Rows) -> None:
        install_target_forward(model, rows)

    def together(self, model: nn.Module, batch: Batch) -> Tensor:
        return ModelPolicy(model).logprobs(batch).logprobs

    def alone(self, model: nn.Module, ids: Tensor) -> Tensor:
        """By dense logits."""
        logits = model(
            input_ids=ids[None], attention_mask=torch.ones_like(ids[None]), use_cache=False
        ).logits[0]
        logprobs: Tensor = logits[:-1].float().log_softmax(-1)
        return logprobs.gather(-1, ids[1:, None])[:, 0]


LANGUAGE = LanguageProbe()


# --------------------------------------------------------------------------------------------------
# What tests of models have in common


def inner_model(model: nn.Module) -> nn.Module:
    """The model itself, without a PEFT wrapper."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    assert isinstance(inner, nn.Module)
    return inner


def model_name(model: nn.Module) -> str:
    return type(inner_model(model)).__name__


@contextmanager
def watched_embeddings(model: nn.Module) -> Iterator[list[Tensor]]:
    """The embedded tokens of each forward pass inside the context, as leaves of its graph."""
    embedded: list[Tensor] = []

    def watch(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    embedding = inner_model(model).get_input_embeddings()  # type: ignore[operator]
    handle = embedding.register_forward_hook(watch)
    try:
        yield embedded
    finally:
        handle.remove()


def gradient_part(where_none: Tensor, where_some: Tensor) -> float:
    """The largest gradient where none should go, as a part of the largest where some should."""
    largest = float(where_none.max())
    return largest / float(where_some.max()) if largest else 0.0
