"""Rotary positions stretched beyond the length that a model was trained on.

The stretch is a change of the model's config, made before the weights are loaded; transformers computes the
frequencies from it. A full model saves its changed config. An adapter's base is changed again wherever the adapter is
attached: the change is recorded beside it as `positions.json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from luthier.recipe.schema import RopeScalingSpec
from luthier.types import ModelError

RECORD_NAME = "positions.json"

KEPT = ("rope_theta", "partial_rotary_factor")
"""What stays of a model's rotary parameters when it is stretched: its base, and which part of a head it turns."""

LLAMA3_BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""The wavelengths between which Llama 3.1 blends stretched into unstretched frequencies."""

WINDOWED = ("sliding_attention", "chunked_attention")
"""Layers that never look further than their window: stretching them would only blur what they see."""


@dataclass(frozen=True, slots=True)
class PositionsChange:
    """A stretch: its kind and factor, and the longest text that the model reads before and after."""

    type: str
    factor: float
    before: int
    after: int

    def __str__(self) -> str:
        return f"{self.type}, {self.factor:g} times, from {self.before:,} to {self.after:,} positions"


def positions_change(
    config: PreTrainedConfig, spec: RopeScalingSpec, max_length: int
) -> PositionsChange | None:
    """What `model.rope_scaling` asks of this model; None where its positions suffice for `max_length` tokens.

    Raises ModelError for a model without rotary positions, or whose positions are already of a kind that no factor
    stretches, and for a factor that `max_length` does not fit into.
    """
    text = config.get_text_config()
    layers = _stretched_layers(text)
    longest = getattr(text, "max_position_embeddings", None)
    if not layers or longest is None:
        raise ModelError(
            f"model.rope_scaling: {_name(config)} has no rotary positions that could be stretched; leave it out"
        )
    kinds = {layer.get("rope_type", "default") for layer in layers}
    if not kinds <= {"default", "linear", "dynamic", "yarn", "llama3"}:
        raise ModelError(
            f"model.rope_scaling: the positions of {_name(config)} are of type {', '.join(sorted(kinds))}, which is "
            "made for long texts already; leave it out"
        )
    originals = [layer.get("original_max_position_embeddings") for layer in layers]
    before = int(next((length for length in originals if length), longest))
    if spec.factor is None:
        if max_length <= longest:
            return None
        factor = float(math.ceil(max_length / before))
    else:
        factor = spec.factor
    after = math.ceil(before * factor)
    if max_length > after:
        raise ModelError(
            f"model.rope_scaling.factor={factor:g} stretches {before:,} positions to {after:,}, and "
            f"data.max_length={max_length:,} is longer; leave the factor out or lower data.max_length"
        )
    return PositionsChange(spec.type, factor, before, after)


def stretch(config: PreTrainedConfig, change: PositionsChange) -> None:
    """Make the change in a config that no model has been made from yet.

    linear (Chen et al., 2023, arXiv:2306.15595), dynamic (NTK-aware, within `after` positions as the model was),
    yarn (Peng et al., 2023, arXiv:2309.00071), llama3 (Llama 3.1).
    """
    text = config.get_text_config()
    # First: transformers checks the original length of llama3 and yarn against it.
    text.max_position_embeddings = change.after
    parameters = text.rope_parameters
    if _is_nested(parameters):
        text.rope_parameters = {
            name: layer if name in WINDOWED or layer is None else _parameters(layer, change)
            for name, layer in parameters.items()
        }
    else:
        text.rope_parameters = _parameters(parameters, change)


def stretch_loaded(model: PreTrainedModel, change: PositionsChange) -> None:
    """Make the change in a model that is loaded already: its config, and the frequencies that came from it."""
    stretch(model.config, change)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            devices = [
                buffer.device
                for key, buffer in child.named_buffers(recurse=False)
                if key.endswith("inv_freq")
            ]
            if devices and hasattr(child, "config"):
                setattr(parent, name, type(child)(child.config).to(devices[0]))
    model.luthier_positions = change  # type: ignore[assignment]


def require_positions(config: PreTrainedConfig, longest: int, *, alone: bool) -> None:
    """Raise ModelError unless a model has a position for each of `longest` tokens, the same beside any other sample.

    Rotary positions go on without end, except those whose frequencies depend on the longest text of a forward pass
    (longrope, dynamic): they need every sample to go through `alone`.
    """
    text, label = config.get_text_config(), _name(config)
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    layers = _stretched_layers(text)
    if not layers:
        if limit is not None and longest > limit:
            raise ModelError(
                f"{label} has {limit:,} positions and the longest sample has {longest:,} tokens; "
                f"set data.max_length={limit}"
            )
        return
    for layer in layers:
        kind = layer.get("rope_type")
        if kind == "longrope" and longest > layer["original_max_position_embeddings"] and not alone:
            raise ModelError(
                f"the positions of {label} are others in texts of more than "
                f"{layer['original_max_position_embeddings']:,} tokens (longrope), so a short sample would depend on "
                f"a long one beside it, and the longest has {longest:,}; set train.tokens_per_pass=1, and every "
                f"sample goes through the model alone, or data.max_length="
                f"{layer['original_max_position_embeddings']}"
            )
        if kind == "dynamic" and limit is not None and longest > limit:
            raise ModelError(
                f"the positions of {label} are others after a text of more than {limit:,} tokens (dynamic), so a "
                f"sample would depend on those before it, and the longest has {longest:,}; "
                f"set data.max_length={limit}, or model.rope_scaling to another type"
            )


def _parameters(layer: Mapping[str, Any], change: PositionsChange) -> dict[str, Any]:
    kept = {name: layer[name] for name in KEPT if layer.get(name) is not None}
    parameters = {"rope_type": change.type, "factor": change.factor, **kept}
    if change.type in ("yarn", "llama3"):
        parameters["original_max_position_embeddings"] = change.before
    return parameters | (LLAMA3_BANDS if change.type == "llama3" else {})


def _is_nested(parameters: Mapping[str, Any]) -> bool:
    """Whether each type of layer has parameters of its own (Gemma 3)."""
    return any(isinstance(value, Mapping) for value in parameters.values())


def _stretched_layers(text: PreTrainedConfig) -> list[Mapping[str, Any]]:
    parameters = getattr(text, "rope_parameters", None)
    if not parameters:
        return []
    if not _is_nested(parameters):
        return [parameters]
    return [
        layer for name, layer in parameters.items() if name not in WINDOWED and isinstance(layer, Mapping)
    ]


def _name(config: PreTrainedConfig) -> str:
    return str((config.architectures or [config.model_type])[0])


# --------------------------------------------------------------------------------------------------
# The record beside an adapter


def write_positions(folder: Path, change: PositionsChange) -> None:
    """Record the change in an adapter's folder."""
    (folder / RECORD_NAME).write_text(json.dumps(asdict(change), indent=2) + "\n", encoding="utf-8")


def read_positions(folder: str | Path) -> PositionsChange | None:
    """The change that the adapter in `folder` was trained with; None where there is no record.

    Raises ModelError for a record that is damaged.
    """
    file = Path(folder) / RECORD_NAME
    if not file.is_file():
        return None
    try:
        return PositionsChange(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ModelError(f"{file} is no record of stretched positions: {error}") from error


def recorded_positions(
    adapters: Iterable[str], wanted: PositionsChange | None, *, decided: bool
) -> PositionsChange | None:
    """The change that these adapters need of their base; `wanted` where there are none (a hub name cannot be asked).

    With `decided` the recipe says itself what it wants. Raises ModelError where adapters, or adapters and recipe,
    differ.
    """
    records = [(folder, read_positions(folder)) for folder in adapters if Path(folder).is_dir()]
    if records and not decided:
        wanted = records[0][1]
    for folder, record in records:
        if record != wanted:
            raise ModelError(
                f"method.adapters: {folder} was trained with {_said(record)}, and this run has {_said(wanted)}; "
                "give the same model.rope_scaling"
            )
    return wanted


def _said(change: PositionsChange | None) -> str:
    return "the model's own positions" if change is None else f"stretched positions ({change})"


def loaded_positions(model: nn.Module) -> PositionsChange | None:
    """The change that a model, or the one inside its PEFT wrapper, was loaded with."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    change = getattr(inner, "luthier_positions", None)
    assert change is None or isinstance(change, PositionsChange)
    return change
