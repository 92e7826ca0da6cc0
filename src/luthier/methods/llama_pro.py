"""Block expansion (LLaMA Pro, Wu et al., 2024, arXiv:2401.02415): new blocks that start as the identity, and train.

Behind every (layers / blocks) layers stands a copy of the last of them, with the matrices that write into the residual
stream set to zero: the copy adds nothing, so the expanded model says what the model said.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.methods.full import Freeze, decoder_layers
from luthier.model.vocabulary import VocabularyChange
from luthier.recipe.schema import LlamaProSpec
from luthier.types import ModelError

OUTPUTS = ("o_proj", "out_proj", "down_proj", "c_proj", "dense", "dense_4h_to_h", "fc2", "wo", "w2")
"""What families call the matrices that attention and MLP write into the residual stream with."""


class LlamaPro(Freeze):
    """The added blocks train, everything else is frozen; what is saved is a whole model with more layers."""

    spec: LlamaProSpec  # type: ignore[assignment]

    def __init__(self, spec: LlamaProSpec, vocabulary: VocabularyChange) -> None:
        super().__init__(spec, vocabulary)  # type: ignore[arg-type]

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        """Expand the model, unless it is already, and freeze what it had.

        Raises ModelError where its layers do not divide, or its copies would not be the identity.
        """
        if self.spec.expand:
            expand(model, self.spec.blocks)
        return super().apply(model)

    def _layer_indices(self, num_layers: int) -> range:
        _require_division(num_layers, self.spec.blocks)
        stride = num_layers // self.spec.blocks
        return range(stride - 1, num_layers, stride)


def expand(model: PreTrainedModel, blocks: int) -> None:
    """Insert `blocks` identity blocks in place; `num_hidden_layers` and lists by layer in the config follow.

    Raises ModelError where that is not possible.
    """
    _, layers = decoder_layers(model)
    before, num_layers = _probe(model), len(layers)
    _require_division(num_layers, blocks)
    stride = num_layers // blocks
    order: list[tuple[int, bool]] = []
    for index in range(num_layers):
        order.append((index, False))
        if (index + 1) % stride == 0:
            order.append((index, True))
    kept = list(layers)
    while len(layers):
        del layers[-1]
    for index, added in order:
        layers.append(_identity_of(kept[index]) if added else kept[index])
    for place, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # its place in the cache of keys and values
                vars(module)["layer_idx"] = place
    _renumber(model, [index for index, _ in order], num_layers)
    if not torch.equal(_probe(model), before):
        raise ModelError(
            f"method: llama_pro: {type(model).__name__} with blocks whose outputs are zero is not the same "
            "function, so it cannot be expanded; use method: freeze or lora"
        )


def _require_division(num_layers: int, blocks: int) -> None:
    if num_layers % blocks:
        choices = [number for number in range(1, num_layers + 1) if num_layers % number == 0]
        raise ModelError(
            f"method.blocks={blocks} does not divide the model's {num_layers} layers; choose from {choices}"
        )


def _identity_of(layer: nn.Module) -> nn.Module:
    block = copy.deepcopy(layer)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parts = name.split(".")
            # Experts of a mixture are parameters of their own, without `.weight`.
            if (parts[-2] if parts[-1] in ("weight", "bias") else parts[-1]) in OUTPUTS:
                parameter.zero_()
    return block


def _renumber(model: PreTrainedModel, sources: list[int], num_layers: int) -> None:
    """Config values that stand by layer, `layer_types` for one, are repeated for the copies."""
    config: Any = model.config.get_text_config()
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == num_layers and not name.startswith("_"):
            setattr(config, name, [value[index] for index in sources])
    config.num_hidden_layers = len(sources)


@torch.no_grad()
def _probe(model: PreTrainedModel) -> Tensor:
    """Logits of a short row, of any model."""
    training = model.training
    device = next(model.parameters()).device
    ids = torch.arange(3, 11, device=device)[None] % model.config.get_text_config().vocab_size
    try:
        logits: Tensor = model.eval()(  # type: ignore[no-untyped-call]
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
        ).logits
    finally:
        model.train(training)
    return logits
