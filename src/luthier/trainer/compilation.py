"""torch.compile for flat rows: the decoder layers, one by one, with the number of tokens left open.

A layer is compiled once and its code serves all layers and all lengths; what runs per segment (attention) stays out of
the compiler, because the number of segments changes with every pass. Layers are compiled in place, so names in
checkpoints do not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from transformers import AttentionInterface

from luthier.methods.full import decoder_layers
from luthier.model.attention import KERNELS
from luthier.recipe.schema import CompileSpec
from luthier.types import ModelError, RecipeError

INDUCTOR = "inductor"


def compile_layers(model: nn.Module, spec: CompileSpec) -> None:
    """Compile the decoder layers of a causal language model, or of the one inside its PEFT wrapper, in place.

    With gradient checkpointing it is the parts of each layer that are compiled: checkpointing goes around compiled
    code, not into it. Raises RecipeError for a backend that torch has not, ModelError where there is no list of
    layers or the machine cannot compile (no C++ compiler, say).
    """
    backends = torch.compiler.list_backends(exclude_tags=())
    if spec.backend not in backends:
        raise RecipeError(
            f"train.compile.backend={spec.backend}: torch has no such backend; choose from {', '.join(backends)}"
        )
    how = _how(spec)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    try:
        _, layers = decoder_layers(inner)  # type: ignore[arg-type]
    except ModelError as error:
        raise ModelError(f"train.compile: {error}; remove train.compile") from error
    _try_compiler(how)
    for name, kernel in KERNELS.items():
        AttentionInterface.register(name, torch.compiler.disable(kernel.__call__))  # type: ignore[no-untyped-call]
    for region in _regions(layers):
        region.compile(**how)


def _how(spec: CompileSpec) -> dict[str, Any]:
    if spec.backend != INDUCTOR:
        if spec.mode != "default":
            raise RecipeError(
                f"train.compile.mode={spec.mode} is for the backend {INDUCTOR}, not {spec.backend}"
            )
        return {"backend": spec.backend, "dynamic": True}
    from torch._inductor import list_mode_options

    options = {
        **list_mode_options(spec.mode),
        # Dropout draws what it draws without compiling.
        "fallback_random": True,
        # A CUDA graph holds for one number of tokens, and every pass has another.
        "triton.cudagraph_skip_dynamic_graphs": True,
    }
    return {"backend": INDUCTOR, "dynamic": True, "options": options}


def _regions(layers: nn.ModuleList) -> Iterator[nn.Module]:
    for layer in layers:
        if getattr(layer, "gradient_checkpointing", False):
            yield from layer.children()
        else:
            yield layer


def _try_compiler(how: dict[str, Any]) -> None:
    """Compile two additions, so that a machine without its tools says so before the run begins."""
    try:
        torch.compile(lambda x: x + x + 1, **how)(torch.ones(4))
    except TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"train.compile: torch cannot compile on this machine: {reason}. The backend {INDUCTOR} needs a C++ "
            "compiler (g++ or clang++) and Python's headers; remove train.compile to train without"
        ) from error
