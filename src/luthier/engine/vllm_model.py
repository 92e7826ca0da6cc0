"""The parts of a trained model -> vLLM's engine on them, where it can hold them as they were trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from luthier.engine.protocol import Decode
from luthier.engine.vllm import VllmEngine
from luthier.methods.adapter_files import ADAPTER
from luthier.model.load import ModelSource
from luthier.model.positions import recorded_positions
from luthier.model.vocabulary import recorded_change
from luthier.recipe.generation import GenerationSpec
from luthier.trained.source import Trained
from luthier.types import ModelError


def open_vllm(
    trained: Trained,
    source: ModelSource,
    spec: GenerationSpec,
    *,
    decode: Decode,
    adapters: Mapping[str, str | Path],
    device: torch.device,
) -> VllmEngine:
    """vLLM's engine on a whole model, or on a base with plain LoRA adapters: the trained one, called `default`, and
    those given.

    Raises ModelError for what vLLM cannot hold as it was trained; exported, it can.
    """
    require_held(trained, source)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    if device.type != here or device.index not in (None, 0):
        raise ModelError(f"--device {device}: vLLM chooses its device itself, here {here}; leave it out")
    own = {ADAPTER: trained.adapters[0]} if trained.adapters else {}
    return VllmEngine(
        source.path,
        dtype=trained.model.dtype,
        rows=spec.rows,
        memory=spec.memory,
        decode=decode,
        adapters={**own, **adapters},
    )


def require_held(trained: Trained, source: ModelSource) -> None:
    """Raise ModelError for a model that is not in its folder as vLLM would read it."""
    reasons = {
        "it is a reward model": trained.kind != "language",
        "it is quantized while it is loaded": trained.model.quantization is not None,
        "it has adapters below the last one": len(trained.adapters) > 1,
        "it has new tokens": recorded_change(trained.adapters) is not None,
        "its positions are stretched": recorded_positions(trained.adapters, None, decided=False) is not None,
        "it runs code of its own": trained.model.trust_remote_code,
        "it is not in a local folder": not source.local,
    }
    found = next((reason for reason, holds in reasons.items() if holds), None)
    if found is not None:
        raise ModelError(
            f"generation.engine=vllm: vLLM loads {trained.label} from a folder as it is there, and {found}: export it "
            "with `luthier export`, and name the exported folder; or use generation.engine=hf"
        )
