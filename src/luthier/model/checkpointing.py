"""Which layers compute their activations again in the backward pass (Chen et al., 2016, arXiv:1604.06174).

transformers' layers and torch's `checkpoint` do it; here is chosen which layers, and which of torch's two ways.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from luthier.model.multimodal import in_language
from luthier.recipe.schema import CheckpointingSpec
from luthier.types import ModelError

KEY = "model.gradient_checkpointing"


def checkpoint_layers(model: PreTrainedModel, spec: CheckpointingSpec) -> list[int]:
    """Let the chosen decoder layers compute their activations again; returns their numbers.

    Raises ModelError for a model that cannot, or does not let its layers be chosen, and for a layer that it has not.
    """
    if not model.supports_gradient_checkpointing:
        raise ModelError(f"{KEY}: {type(model).__name__} does not compute activations again; set it to false")
    renamed = getattr(model, "activation_checkpointing_enable", None)  # transformers 5.23
    (renamed or model.gradient_checkpointing_enable)({"use_reentrant": spec.reentrant})
    own = in_language(model)
    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, GradientCheckpointingLayer) and own(name)
    ]
    chosen = _numbers(model, spec, len(layers))
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number in chosen
    return sorted(chosen)


def _numbers(model: nn.Module, spec: CheckpointingSpec, count: int) -> set[int]:
    if not spec.layers and spec.every == 1:
        return set(range(count))
    asked = "layers" if spec.layers else "every"
    num_layers = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    if count != num_layers:
        raise ModelError(
            f"{KEY}.{asked}: {type(model).__name__} does not let single layers be chosen; leave it out"
        )
    if not spec.layers:
        return set(range(0, count, spec.every))
    wrong = [number for number in spec.layers if not -count <= number < count]
    if wrong:
        raise ModelError(f"{KEY}.layers: there is no layer {wrong[0]}; the model has 0 to {count - 1}")
    return {number % count for number in spec.layers}
