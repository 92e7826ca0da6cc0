"""Base and adapters -> one model, and that model -> files.

Adapters are merged by PEFT, in float32 whatever the base is: W + BA is then rounded once, when it is written. Adapters
below the last one are merged in the base's own type, because so the training of the last one had them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from luthier.exporting.dequantize import dequantize, is_quantized
from luthier.exporting.source import Trained
from luthier.methods.adapter_files import attach_adapter
from luthier.model.load import ModelSource, load_model
from luthier.model.positions import recorded_positions
from luthier.model.quantized_layers import num_weights
from luthier.model.value_head import HEAD_WEIGHT, VALUE_HEAD_NAME, value_head, write_value_head
from luthier.model.vocabulary import recorded_change, resize_embeddings
from luthier.types import ExportError, ModelError

_ROOM = 64 * 2**20
"""Bytes beside the weights: tokenizer, reports, what the file system needs."""


@dataclass(frozen=True, slots=True)
class Loader:
    """Loads the trained model as often as it is asked for: the base, everything but the last adapter merged into it,
    the last one attached."""

    trained: Trained
    source: ModelSource
    device: torch.device

    def live(self, *, dequantized: bool = False) -> PreTrainedModel | PeftModel:
        """The model as it was trained, evaluating. With `dequantized`, its base has plain weights in float32, and so it
        has below several adapters: nothing can be added into rounded weights without rounding them anew.

        Raises ModelError for what does not fit together.
        """
        trained = self.trained
        positions = recorded_positions(trained.adapters, None, decided=False)
        base = load_model(
            trained.model,
            self.source,
            self.device,
            own_attention=True,
            positions=positions,
            kind=trained.kind,
        )
        if (dequantized or len(trained.adapters) > 1) and is_quantized(base):
            base = dequantize(base)
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


# --------------------------------------------------------------------------------------------------
# Writing


def num_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the weights in `dtype`."""
    return num_weights(model) * dtype.itemsize


def require_space(folder: Path, needed: int) -> None:
    """Raise ExportError where the disk of `folder` has no room for `needed` bytes of weights."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed + _ROOM:
        raise ExportError(
            f"the model needs {(needed + _ROOM) / 2**30:.2f} GiB in {there}, and {free / 2**30:.2f} GiB are free; "
            "name another folder, or make room"
        )


def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    stop_ids: Sequence[int],
    shard_size: str,
) -> None:
    """Write weights, configs, tokenizer and template; of a reward model the value head alone, too."""
    _say_special_tokens(model, tokenizer, stop_ids)
    model.config.dtype = next(model.parameters()).dtype
    model.save_pretrained(folder, max_shard_size=shard_size)
    tokenizer.save_pretrained(folder)


def keep_value_head(model: PreTrainedModel, trained: Trained, folder: Path) -> None:
    """Write the head of a reward model in float32: the run's own file where it has one (it may hold a bias)."""
    saved = Path(trained.adapters[-1] if trained.adapters else trained.model.path) / VALUE_HEAD_NAME
    if saved.is_file():
        shutil.copyfile(saved, folder / VALUE_HEAD_NAME)
    elif value_head(model) is not None:
        write_value_head(folder, model.state_dict())


def value_head_fault(folder: Path, head: Tensor) -> str | None:
    """What is wrong with the value head's own file beside a model whose head is `head` (1, D)."""
    file = folder / VALUE_HEAD_NAME
    if not file.is_file():
        return f"{VALUE_HEAD_NAME} is missing"
    saved = load_file(file)["v_head.summary.weight"].to(head)
    return None if torch.equal(saved, head) else f"{VALUE_HEAD_NAME} holds another head than {HEAD_WEIGHT}"


def _say_special_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]
) -> None:
    """Ends and padding, where others look for them: in the configs."""
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    model.config.pad_token_id, model.config.eos_token_id = pad, eos
    settings: Any = getattr(model, "generation_config", None)
    if settings is None:
        return
    settings.eos_token_id = stop_ids[0] if len(stop_ids) == 1 else list(stop_ids)
    settings.pad_token_id = pad
    sampled = any(
        getattr(settings, name, None) not in (None, 1.0, 50) for name in ("temperature", "top_p", "top_k")
    )
    if sampled and not settings.do_sample:
        # transformers writes no settings that contradict each other, as those of some bases do.
        settings.do_sample = True


# --------------------------------------------------------------------------------------------------
# Tensors


def tensor_hashes(model: nn.Module, dtype: torch.dtype) -> dict[str, str]:
    """SHA-256 of every tensor in the state of a model, floating ones as `dtype`."""
    return {name: _hash(tensor, dtype) for name, tensor in model.state_dict().items()}


def _hash(tensor: Tensor, dtype: torch.dtype) -> str:
    plain = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
    digest = hashlib.sha256(json.dumps(list(plain.shape)).encode())
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def changed_tensors(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Names of tensors that are not the same, or in one of them alone."""
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
