"""Full and partial fine-tuning: the model's own parameters train. Freeze is full with most held still."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from luthier.methods.groups import checkpoints_activations, decay_groups, require_input_gradients
from luthier.methods.patterns import matched
from luthier.model.faults import LOAD_ERRORS
from luthier.model.multimodal import (
    frozen_parameters,
    frozen_parts,
    in_language,
    language_class,
    outside_language,
)
from luthier.model.norms import write_type
from luthier.model.processor import write_processor
from luthier.model.value_head import value_head, write_value_head
from luthier.model.vocabulary import VocabularyChange, token_modules
from luthier.recipe.schema import FreezeSpec, FullSpec
from luthier.types import CheckpointError, ModelError


class Full:
    """Every parameter trains, but those that the recipe holds still; what is saved is a whole model."""

    def __init__(self, spec: FullSpec | FreezeSpec, vocabulary: VocabularyChange) -> None:
        self.spec = spec
        self.vocabulary = vocabulary

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        """Let all train but what `frozen` names.

        Raises ModelError for a pattern that names nothing, and for one that names what starts as noise.
        """
        model.requires_grad_(True)
        return self._finished(model)

    def _finished(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with what is frozen by pattern, and gradients that reach what trains."""
        frozen = matched(model, getattr(self.spec, "frozen", ()), "method.frozen")
        held = frozen_parameters(model)
        needed = {one for module in self._starts_as_noise(model) for one in module.parameters()}
        for parameter, names in frozen.items():
            if parameter in needed:
                raise ModelError(
                    f"method.frozen holds {names[0]} still, and it has rows that are noise until they train; "
                    "narrow the pattern"
                )
            parameter.requires_grad_(False)
        for parameter, name in held.items():
            if parameter in needed:
                raise ModelError(
                    f"model.frozen_parts holds {name} still, and it has rows that are noise until they train"
                )
            parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            also = f"; model.frozen_parts holds {list(frozen_parts(model))}" if held else ""
            raise ModelError(f"method.{self.spec.type} trains nothing: {self._why_nothing()}{also}")
        if any(parameter.requires_grad for parameter in model.get_input_embeddings().parameters()):
            return model
        # Checkpointed layers below the first trained one would otherwise see inputs without a gradient.
        if checkpoints_activations(model):
            require_input_gradients(model)
        return model

    def _starts_as_noise(self, model: PreTrainedModel) -> list[nn.Module]:
        """The value head, and what has rows of new tokens."""
        modules = (value_head(model), *(token_modules(model) if self.vocabulary.new_ids else ()))
        return [module for module in modules if module is not None]

    def _why_nothing(self) -> str:
        return "frozen names every parameter"

    def parameter_groups(self, model: nn.Module, weight_decay: float, lr: float) -> list[dict[str, Any]]:
        return decay_groups(model, weight_decay)

    def save(self, model: PreTrainedModel, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        model.save_pretrained(folder, state_dict=None if state is None else dict(state))
        write_type(model, folder)
        write_processor(model, folder)
        if value_head(model) is not None:
            write_value_head(folder, model.state_dict() if state is None else state)

    def load(self, model: PreTrainedModel, folder: Path) -> None:
        """Put the weights of `folder` into `model`. Raises CheckpointError where they do not fit exactly."""
        files = sorted(folder.glob("model*.safetensors"))  # beside which a critic or a rollout may lie
        if not files:
            raise CheckpointError(f"{folder} holds no model weights (model*.safetensors)")
        state = {name: tensor for file in files for name, tensor in load_file(file).items()}
        own = model.state_dict()
        if state.keys() - own.keys():
            state = _under_own_names(model, folder) or state
        wrong = [name for name in state.keys() & own.keys() if state[name].shape != own[name].shape]
        if wrong:
            raise CheckpointError(
                f"{folder} does not fit the model: {min(wrong)} has the shape {tuple(state[min(wrong)].shape)} "
                f"there and {tuple(own[min(wrong)].shape)} here"
            )
        result = model.load_state_dict(state, strict=False)
        tied = set(model.all_tied_weights_keys)
        missing = [name for name in result.missing_keys if name not in tied]
        if missing or result.unexpected_keys:
            raise CheckpointError(
                f"{folder} does not fit the model: missing {missing[:3]}, "
                f"unexpected {result.unexpected_keys[:3]}"
            )


class Freeze(Full):
    """A few decoder layers, or named modules in them, train; everything else is frozen.

    The value head of a reward model trains too, and where the vocabulary was extended the embeddings and the output
    head: they are noise until they do.
    """

    spec: FreezeSpec

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        """Let the chosen layers, modules and parameters train.

        Raises ModelError for what the model does not have, and where nothing would train.
        """
        model.requires_grad_(False)
        for parameter in outside_language(model):
            parameter.requires_grad_(True)  # those that model.frozen_parts holds are frozen in the end
        prefix, layers = decoder_layers(model)
        for index in self._layer_indices(len(layers)):
            self._train_layer(f"{prefix}.{index}", layers[index])
        for name in self.spec.extra_modules:
            self._train_extra(model, name, prefix)
        for parameter in matched(model, getattr(self.spec, "trains", ()), "method.trains"):
            parameter.requires_grad_(True)
        for module in self._starts_as_noise(model):
            module.requires_grad_(True)
        return self._finished(model)

    def _why_nothing(self) -> str:
        return "layers is 0, extra_modules and trains are empty, or frozen names all of them"

    def _layer_indices(self, num_layers: int) -> range:
        count = self.spec.layers
        if abs(count) > num_layers:
            raise ModelError(f"method.layers={count}, but the model has only {num_layers} layers")
        return range(num_layers - count, num_layers) if count > 0 else range(-count)

    def _train_layer(self, path: str, layer: nn.Module) -> None:
        if self.spec.modules == ("all",):
            layer.requires_grad_(True)
            return
        for name in self.spec.modules:
            found = [module for key, module in layer.named_modules() if key and name in key.split(".")]
            if not found:
                choices = sorted(key for key, _ in layer.named_children())
                raise ModelError(
                    f"method.modules: no module {name!r} in {path}; choose from {choices} or 'all'"
                )
            for module in found:
                module.requires_grad_(True)

    def _train_extra(self, model: nn.Module, name: str, layers: str) -> None:
        outside = {
            key: module
            for key, module in model.named_modules()
            if key and not key.startswith(f"{layers}.") and not layers.startswith(key)
        }
        found = [module for key, module in outside.items() if name in key.split(".")]
        if not found:
            choices = sorted({key.rsplit(".", 1)[-1] for key in outside})
            raise ModelError(
                f"method.extra_modules: no module {name!r} outside the layers; choose from {choices}"
            )
        for module in found:
            module.requires_grad_(True)


def _under_own_names(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """The weights of `folder` as transformers reads them; none where it cannot, or misses some.

    It writes many families under the names that their first checkpoints had (LLaVA, Qwen2.5-VL, experts of mixtures).
    """
    auto: Any = AutoModelForSequenceClassification if value_head(model) is not None else None
    try:
        loaded, report = (auto or language_class(model.config)).from_pretrained(
            str(folder), dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
    except LOAD_ERRORS:
        return {}
    return {} if report["missing_keys"] or report["mismatched_keys"] else dict(loaded.state_dict())


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder layers. Raises ModelError for a model that has no such list."""
    num_layers, chosen = model.config.get_text_config().num_hidden_layers, in_language(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and chosen(name):
            return name, module
    raise ModelError(f"{type(model).__name__} has no list of {num_layers} decoder layers to freeze by")
