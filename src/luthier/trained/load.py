"""The parts of a trained model -> the model as it was trained: base, adapters, new tokens, positions.

Adapters below the last one are merged in the base's own type, because so the training of the last one had them.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from luthier.methods.adapter_files import attach_adapter
from luthier.model.load import ModelSource, load_model
from luthier.model.positions import recorded_positions
from luthier.model.processor import processor_files, remember_processor
from luthier.model.vocabulary import recorded_change, resize_embeddings
from luthier.trained.dequantize import dequantize, is_quantized
from luthier.trained.source import Trained
from luthier.types import ModelError


@dataclass(frozen=True, slots=True)
class Loader:
    """Loads the trained model as often as it is asked for: the base, everything but the last adapter merged into it,
    the last one attached."""

    trained: Trained
    source: ModelSource
    device: torch.device

    def live(self, *, dequantized: bool = False, own_attention: bool = True) -> PreTrainedModel | PeftModel:
        """The model as it was trained, evaluating. With `dequantized`, its base has plain weights in float32, and so it
        has below several adapters: nothing can be added into rounded weights without rounding them anew. Without
        `own_attention` its segments can be kept apart in flat rows, where it allows that.

        Raises ModelError for what does not fit together.
        """
        trained = self.trained
        positions = recorded_positions(trained.adapters, None, decided=False)
        base = load_model(
            trained.model,
            self.source,
            self.device,
            own_attention=own_attention,
            positions=positions,
            kind=trained.kind,
        )
        if (dequantized or len(trained.adapters) > 1) and is_quantized(base):
            base = dequantize(base)
        last = trained.adapters[-1] if trained.adapters else None
        if last is not None and Path(last).is_dir() and (files := processor_files(last, {})):
            remember_processor(base, files)  # its training may have set other limits than the base's
        record = recorded_change(trained.adapters)
        if record is not None:
            resize_embeddings(base, record)
        for folder in trained.adapters[:-1]:
            base = _unloaded(attach_adapter(base, folder, trainable=False), folder)
        model: Any = base
        if trained.adapters:
            model = attach_adapter(base, trained.adapters[-1], trainable=False)
        live: PreTrainedModel | PeftModel = model.eval()
        return live


def merged(live: PreTrainedModel | PeftModel, trained: Trained) -> PreTrainedModel:
    """The one model that `live`, in float32, is; `live` is used up. Raises ModelError for adapters without a merge."""
    return _unloaded(live, trained.adapters[-1]) if isinstance(live, PeftModel) else live


def _unloaded(model: PeftModel, folder: str) -> PreTrainedModel:
    merge = getattr(model.base_model, "merge_and_unload", None)
    kind: Any = model.active_peft_config.peft_type
    if model.active_peft_config.is_prompt_learning or merge is None:
        raise ModelError(
            f"{folder}: an adapter of type {kind.value} cannot be merged into weights; serve it as it is"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # tied weights: the written model is compared
            plain = merge(safe_merge=True)
    except ValueError as error:
        raise ModelError(f"{folder} could not be merged: {error}") from error
    assert isinstance(plain, PreTrainedModel)
    return plain
