"""An adapter's folder: what is in it, and whether it is an adapter of this model. PEFT attaches one of any other."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, TaskType, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from luthier.model.faults import LOAD_ERRORS, read_json, reason
from luthier.model.quantized_layers import is_int8, quantized_layers
from luthier.model.value_head import value_head
from luthier.types import ModelError

PARTS = (
    *sorted(f".{prefix}" for prefix in set(PEFT_TYPE_TO_PREFIX_MAPPING.values())),
    ".modules_to_save.",
    ".trainable_tokens_delta.",
)
"""How PEFT's tuners name what they add to a model; the rest is its base."""
ADAPTER = "default"
"""PEFT's name for the adapter that trains."""
_HEADS = frozenset(("classifier", "score"))
"""What PEFT calls the heads of classifiers."""
ON_QUANTIZED = (
    *(
        "LORA",
        "OFT",
        "VERA",
        "IA3",
        "MISS",
        "BEFT",
        "BOFT",
        "C3A",
        "FOURIERFT",
        "GRALORA",
        "LILY",
        "LN_TUNING",
    ),
    *("PVERA", "RANDLORA", "ROAD", "SHIRA", "VBLORA", "WAVEFT"),
)
"""Tuners of PEFT that say on every quantized base what they say on the plain one with its dequantized weights. Some of
the others fail in a product, and some (HRA, PEANUT) take the rounded numbers for weights, without a word."""


def require_base(model: nn.Module, config: PeftConfig, label: str) -> None:
    """Raise ModelError for an adapter that does not compute rightly on this model's quantized layers."""
    layers = quantized_layers(model)
    if not layers:
        return
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in ON_QUANTIZED:
        raise ModelError(
            f"{label}: PEFT's {kind} computes with the base's weights themselves, and this base is quantized; choose "
            f"one of {', '.join(ON_QUANTIZED)}, or a plain base"
        )
    if getattr(config, "init_lora_weights", None) == "orthogonal":
        raise ModelError(
            f"{label}: init: orthogonal changes the base's weights, and these are quantized; remove it"
        )
    if getattr(config, "use_dora", False) and any(is_int8(layer) for layer in layers.values()):
        raise ModelError(
            f"{label}: PEFT's DoRA does not get at the weights of LLM.int8(); give model.quantization bits: 4, or "
            "dora: false"
        )


def missing_weights(model: PeftModel, missing: Sequence[str]) -> list[str]:
    """Those of the `missing` keys of a loaded state that belong to the adapter, in their order.

    A tied matrix is saved once and stands under two names; of those `named_parameters` gives the first.
    """
    absent, parameters = set(missing), dict(model.named_parameters())
    # A matrix that many layers share stands under the name of each.
    given = {
        parameter.data_ptr()
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name not in absent
    }
    return [
        name
        for name in missing
        if (parameter := parameters.get(name)) is not None
        and (parameter.requires_grad or (f".{ADAPTER}" in name and any(part in name for part in PARTS)))
        and parameter.data_ptr() not in given
    ]


def attach_adapter(model: PreTrainedModel, folder: str, *, trainable: bool, name: str = ADAPTER) -> PeftModel:
    """The model with the adapter in `folder` (or of a hub name), called `name`.

    Raises ModelError where it is no adapter, damaged, or of a model with other layers or shapes.
    """
    label = f"method.adapters: {folder}"
    _check_folder(folder, label)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the keys that are counted below
            config = _config_for(model, PeftConfig.from_pretrained(folder), label, trainable=trainable)
            require_base(model, config, label)
            attached = PeftModel.from_pretrained(
                model, folder, is_trainable=trainable, config=config, adapter_name=name
            )
        # PEFT leaves what it does not find as it was drawn, and drops what has no place.
        result: Any = set_peft_model_state_dict(attached, load_peft_weights(folder, device="cpu"), name)
    except KeyError as error:  # PEFT looks saved modules up by name
        raise ModelError(f"{label} was trained on another model: this one has no {error}") from error
    except LOAD_ERRORS as error:
        raise ModelError(_fault(label, error)) from error
    _require_all(attached, result, label)
    return attached


def attach_further(model: PeftModel, folder: str, name: str) -> None:
    """Put one more adapter beside those of `model`, to be chosen by name.

    Raises ModelError as `attach_adapter` does.
    """
    label = f"the adapter {name}={folder}"
    _check_folder(folder, label)
    base: Any = model.get_base_model()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the keys that are counted below
            require_base(base, PeftConfig.from_pretrained(folder), label)
            result: Any = model.load_adapter(folder, adapter_name=name)
    except KeyError as error:
        raise ModelError(f"{label} was trained on another model: this one has no {error}") from error
    except LOAD_ERRORS as error:
        raise ModelError(_fault(label, error)) from error
    result.missing_keys[:] = [key for key in result.missing_keys if name in key.split(".")]  # not the others'
    _require_all(model, result, label)


def attach_scorer(model: PeftModel, folder: str, name: str, label: str) -> None:
    """Put the adapter of a reward model beside those of a language model, called `name`, without its value head.

    Which adapters are active and what trains is PEFT's choice after this. Raises ModelError, beginning with `label`, as
    `attach_adapter` does.
    """
    _check_folder(folder, label)
    base: Any = model.get_base_model()
    try:
        config = PeftConfig.from_pretrained(folder)
        config.task_type, config.inference_mode = TaskType.CAUSAL_LM, False
        if hasattr(config, "modules_to_save"):
            kept = [one for one in config.modules_to_save or () if one not in _HEADS]
            config.modules_to_save = kept or None
        require_base(base, config, label)
        model.add_adapter(name, config)
        weights = load_peft_weights(folder, device="cpu")
        weights = {key: tensor for key, tensor in weights.items() if not _HEADS.intersection(key.split("."))}
        result: Any = set_peft_model_state_dict(model, weights, name)
    except KeyError as error:
        raise ModelError(f"{label} was trained on another model: this one has no {error}") from error
    except LOAD_ERRORS as error:
        raise ModelError(_fault(label, error)) from error
    own = dict(model.named_parameters())
    result.missing_keys[:] = [key for key in result.missing_keys if name in key.split(".") and key in own]
    if result.missing_keys or result.unexpected_keys:
        raise _another_model(label, result.missing_keys, result.unexpected_keys)


def _require_all(attached: PeftModel, result: Any, label: str) -> None:
    """Raise ModelError where weights are missing, or have no place."""
    missing = missing_weights(attached, result.missing_keys)
    if missing or result.unexpected_keys:
        raise _another_model(label, missing, result.unexpected_keys)


def _another_model(label: str, missing: Sequence[str], unexpected: Sequence[str]) -> ModelError:
    return ModelError(
        f"{label} was trained on another model: {len(missing)} of this model's adapted layers have no weights in "
        f"it, and {len(unexpected)} of its weights have no layer ({[*missing, *unexpected][0]} for one)"
    )


def _config_for(model: PreTrainedModel, config: PeftConfig, label: str, *, trainable: bool) -> PeftConfig:
    """The adapter's config as this kind of model takes it. Raises ModelError for an adapter of the other kind that
    cannot be one of this model."""
    scores, settings = config.task_type == TaskType.SEQ_CLS, vars(config)
    if scores and value_head(model) is None:
        raise ModelError(f"{label} is an adapter of a reward model, and stage.type asks for a language model")
    if not scores and value_head(model) is not None:
        if trainable:
            raise ModelError(
                f"{label} is an adapter of a language model and has no value head; set method.create_new_adapter: true "
                "to train a reward model on top of it"
            )
        config.task_type = None  # PEFT would ask the model how it generates
    if scores:
        # PEFT adds the names of heads once more.
        named = settings.get("modules_to_save") or ()
        settings["modules_to_save"] = [name for name in named if name not in _HEADS]
    return config


def linear_names(model: nn.Module) -> list[str]:
    """Last parts of the names of the linear layers: what adapters can be asked for."""
    return sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D)
        }
    )


def _check_folder(folder: str, label: str) -> None:
    path = Path(folder)
    if not path.is_dir():
        if path.exists() or folder.startswith((".", "/", "~")) or folder.count("/") > 1:
            raise ModelError(f"{label}: no such folder")
        return
    if not (path / "adapter_config.json").is_file():
        raise ModelError(f"{label} holds no adapter_config.json, so it is not an adapter")
    kind = read_json(path / "adapter_config.json", label).get("peft_type")
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ModelError(f"{label}: PEFT does not know the peft_type {kind!r} of adapter_config.json")
    if not any((path / f"adapter_model.{ending}").is_file() for ending in ("safetensors", "bin")):
        raise ModelError(f"{label} holds no weights (adapter_model.safetensors)")


def _fault(label: str, error: Exception) -> str:
    if isinstance(error, SafetensorError):
        return f"{label}: adapter_model.safetensors is damaged or cut short ({error}); copy it again"
    mismatches = [line.strip() for line in str(error).splitlines() if "size mismatch for" in line]
    if mismatches:
        name = mismatches[0].removeprefix("size mismatch for ").split(":")[0]
        return (
            f"{label} was trained on another model: {len(mismatches)} of its weights have another shape "
            f"({name} for one)"
        )
    if "not found in the base model" in str(error):
        return f"{label} was trained on another model: its layers are not in this one"
    return f"{label} could not be loaded: {reason(error)}"
