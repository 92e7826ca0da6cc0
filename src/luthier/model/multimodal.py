"""Models that read images, films and sounds: which they are, and which of their parameters belong to which part.

transformers builds nearly all of them alike: a *tower* encodes the media, a *projector* brings what it says to the
width of the *language* model, which reads it in place of placeholder tokens. Only names differ; they are in a table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING

from luthier.recipe.model import ModelPart
from luthier.types import ModelError

KEY = "model.frozen_parts"
DEFAULT_FROZEN: tuple[ModelPart, ...] = ("tower", "projector")
"""What is held still where the recipe says nothing: the field's usual choice."""

_TOWERS = (
    *(
        "visual",
        "vision_tower",
        "vision_model",
        "vision_encoder",
        "image_tower",
        "video_tower",
        "audio_tower",
    ),
    *("encoder", "high_res_vision_model", "acoustic_tokenizer_encoder", "semantic_tokenizer_encoder"),
)
_PROJECTORS = (
    *(
        "multi_modal_projector",
        "mm_projector",
        "projector",
        "connector",
        "aligner",
        "merger",
        "visual.merger",
    ),
    *("audio_tower.proj", "audio_tower.proj1", "audio_tower.proj2", "vision_projection", "vision_adapter"),
    *("embed_vision", "embed_audio", "vision_resampler", "resampler_model", "visual_embeddings_table"),
    *("image_newline", "view_separator", "perception_emb_norm", "high_res_vision_neck"),
    *("high_res_vision_proj", "high_res_vision_alpha"),
)
PARTS: dict[str, ModelPart] = {
    **dict.fromkeys(_TOWERS, "tower"),
    **dict.fromkeys(_PROJECTORS, "projector"),
    **dict.fromkeys(("language_model", "text_model"), "language"),
}
"""Part by the name of a module or parameter inside the multimodal model; of two that fit, the longer one. Mergers that
Qwen3-VL has between its layers count as its tower."""


# --------------------------------------------------------------------------------------------------
# Which models


def is_multimodal(config: PreTrainedConfig) -> bool:
    """Whether the model of this config reads media beside text and answers in text."""
    if config.is_encoder_decoder or config.get_text_config() is config:
        return False
    if type(config) not in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return False
    mapped: Any = MODEL_FOR_MULTIMODAL_LM_MAPPING[type(config)]
    own: str = mapped.__name__
    named = config.architectures or [own]
    return any(name == own or name.endswith("ForSequenceClassification") for name in named)


def language_class(config: PreTrainedConfig) -> Any:
    """The class of transformers that loads the language model of this config, with its towers where it has some."""
    return AutoModelForMultimodalLM if is_multimodal(config) else AutoModelForCausalLM


def makes_positions(backbone: nn.Module) -> bool:
    """Whether the model makes its own positions of the sizes of its media (Qwen2-VL's in three dimensions,
    arXiv:2409.12191): then none may be given for a row with media."""
    return callable(getattr(backbone, "get_rope_index", None))


# --------------------------------------------------------------------------------------------------
# Which part


Sorter = Callable[[str], ModelPart | None]
"""The part that a module or parameter of a full name belongs to; None where the table has it not."""


def sorter(model: PreTrainedModel) -> Sorter:
    """Tells the parts of a model that reads media apart."""
    prefix, head = _prefix(model), _head(model) or "score"

    def part_of(name: str) -> ModelPart | None:
        if _within(name, head):
            return "language"
        inside = name.removeprefix(prefix)
        fitting = [known for known in PARTS if _within(inside, known)]
        return PARTS[max(fitting, key=len)] if fitting else None

    return part_of


def hold_parts(model: PreTrainedModel, wanted: Sequence[ModelPart] | None) -> None:
    """Remember which parts of a loaded model are frozen; `wanted` is the recipe's, None for the default.

    Raises ModelError for parts of a model that has none. Whether they are known is asked only where it trains.
    """
    if not is_multimodal(model.config):
        if wanted:
            raise ModelError(f"{KEY}: {type(model).__name__} reads no media, so it has no parts; remove it")
        return
    model.luthier_frozen_parts = DEFAULT_FROZEN if wanted is None else tuple(wanted)  # type: ignore[assignment]


def _require_known(model: PreTrainedModel, part_of: Sorter) -> None:
    for name, _ in model.named_parameters():
        if part_of(name) is None:
            raise ModelError(
                f"{KEY}: of {type(model).__name__} it is not known to which part {name} belongs; set it to [], "
                "and say by name what trains, with method.frozen or method.targets"
            )


def frozen_parts(model: nn.Module) -> tuple[ModelPart, ...]:
    """What `hold_parts` remembered; nothing of a model without parts."""
    parts: tuple[ModelPart, ...] = getattr(model, "luthier_frozen_parts", ())
    return parts


def frozen_parameters(model: PreTrainedModel) -> dict[nn.Parameter, str]:
    """The parameters of the parts that are held still, and their names. Raises ModelError where it is not known of all
    parameters to which part they belong."""
    frozen, part_of = frozen_parts(model), sorter(model)
    if not frozen:
        return {}
    _require_known(model, part_of)
    return {one: name for name, one in model.named_parameters() if part_of(name) in frozen}


def outside_language(model: PreTrainedModel) -> list[nn.Parameter]:
    """The parameters of tower and projector."""
    if not is_multimodal(model.config):
        return []
    part_of = sorter(model)
    return [one for name, one in model.named_parameters() if part_of(name) in ("tower", "projector")]


def trains_outside_language(model: nn.Module) -> bool:
    """Whether a parameter of tower or projector trains, an adapter's in them among it: a pass without media leaves
    it without a gradient."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return any(parameter.requires_grad for parameter in outside_language(inner))


def in_language(model: PreTrainedModel) -> Callable[[str], bool]:
    """Whether a module of a full name is of the language model, which a model without parts is as a whole."""
    if not is_multimodal(model.config):
        return lambda name: True
    part_of = sorter(model)
    return lambda name: part_of(name) in ("language", None)


def frozen_modules(model: PreTrainedModel) -> str | None:
    """A pattern of the full names of all modules of frozen parts, for PEFT's `exclude_modules`; None for none.

    Raises ModelError as `frozen_parameters` does.
    """
    frozen, prefix = frozen_parts(model), re.escape(_prefix(model))
    if frozen:
        _require_known(model, sorter(model))
    names = []
    for known, part in PARTS.items():
        if part in frozen:
            others = [one for one in PARTS if one.startswith(f"{known}.") and PARTS[one] not in frozen]
            apart = "".join(rf"(?!{prefix}{re.escape(one)}(\.|$))" for one in others)
            names.append(rf"{apart}{prefix}{re.escape(known)}(\..*)?")
    if "language" in frozen and (head := _head(model)) is not None:
        names.append(re.escape(head))
    # Names that the model has not would only make the saved configuration harder to read.
    own = [name for name, _ in model.named_modules()]
    return "|".join(one for one in names if any(re.fullmatch(one, name) for name in own)) or None


def _prefix(model: PreTrainedModel) -> str:
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def _head(model: PreTrainedModel) -> str | None:
    wanted: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return next((name for name, module in model.named_modules() if module is wanted), None)


def _within(name: str, known: str) -> bool:
    return name == known or name.startswith(f"{known}.")
