"""Base and adapters -> one model, and that model -> files.

Adapters are merged by PEFT, in float32 whatever the base is: W + BA is then rounded once, when it is written. Adapters
below the last one are merged in the base's own type, because so the training of the last one had them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from luthier.model.processor import write_processor
from luthier.model.quantized_layers import num_weights
from luthier.model.value_head import HEAD_WEIGHT, VALUE_HEAD_NAME, value_head, write_value_head
from luthier.trained.source import Trained
from luthier.types import ExportError

_ROOM = 64 * 2**20
"""Bytes beside the weights: tokenizer, reports, what the file system needs."""


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
    write_processor(model, folder)
    tokenizer.save_pretrained(folder)


def keep_value_head(model: PreTrainedModel, trained: Trained, folder: Path) -> None:
    """Write the head of a reward model in float32: the run's own file where it has one (it may hold a bias).

    A policy's file is its critic's, which is no part of what is exported.
    """
    if value_head(model) is None:
        return
    saved = Path(trained.adapters[-1] if trained.adapters else trained.model.path) / VALUE_HEAD_NAME
    if saved.is_file():
        shutil.copyfile(saved, folder / VALUE_HEAD_NAME)
    else:
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
