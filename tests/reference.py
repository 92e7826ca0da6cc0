"""Independent references: right-padded rows, transformers' own attention, whole logits, one log_softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.model.logprobs import install_target_forward
from luthier.types import IGNORE_INDEX, Sample
from tests.tiny import tiny_model

Prepare = Callable[[PreTrainedModel], nn.Module]


@dataclass(frozen=True, slots=True)
class Answers:
    """What a model says of every supervised token, sample by sample; each (N,)."""

    logprobs: Tensor
    entropy: Tensor
    mean_logprobs: Tensor
    weights: Tensor


def padded_rows(samples: Sequence[Sample], pad: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded input_ids, attention_mask and labels (-100 where a token's weight is 0), each (B, L)."""
    width = max(len(sample) for sample in samples)
    ids = torch.full((len(samples), width), pad)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for row, sample in enumerate(samples):
        tokens = torch.tensor(sample.input_ids.tolist())
        ids[row, : len(sample)] = tokens
        mask[row, : len(sample)] = 1
        labels[row, : len(sample)] = tokens.where(torch.tensor(sample.weights.tolist()) > 0, IGNORE_INDEX)
    return ids, mask, labels


def dense_answers(model: nn.Module, samples: Sequence[Sample]) -> Answers:
    """From the whole logits of the model's own padded forward pass."""
    ids, mask, _ = padded_rows(samples)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    rows, columns, weights = [], [], []
    for row, sample in enumerate(samples):
        for column in range(1, len(sample)):
            if sample.weights[column] > 0:
                rows.append(row)
                columns.append(column)
                weights.append(float(sample.weights[column]))
    table_NV = logits[rows, [column - 1 for column in columns]].log_softmax(-1)
    return Answers(
        logprobs=table_NV[torch.arange(len(rows)), ids[rows, columns]],
        entropy=-(table_NV.exp() * table_NV).sum(-1),
        mean_logprobs=table_NV.mean(-1),
        weights=torch.tensor(weights),
    )


def head_name(model: PreTrainedModel) -> str:
    """Last part of the name of the output head (`lm_head`, `embed_out`)."""
    head = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head).rsplit(".", 1)[-1]


def without_dropout(model: nn.Module) -> nn.Module:
    """The same model with every dropout probability 0, so that training mode has no chance in it."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model


# ---- what trains -------------------------------------------------------------------------------------------


def train_all(model: PreTrainedModel) -> nn.Module:
    return model.requires_grad_(True)


def freeze_head(model: PreTrainedModel) -> nn.Module:
    """All but the head trains; tied input embeddings are frozen with it."""
    model.requires_grad_(True)
    model.get_output_embeddings().requires_grad_(False)
    return model


def _with_lora(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    torch.manual_seed(3)
    peft_model = get_peft_model(model, config)
    assert isinstance(peft_model, PeftModel)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:  # PEFT begins with zero, which would hide a scale or an ignored adapter
                parameter.normal_(std=0.2)
    return peft_model


def lora_everywhere(model: PreTrainedModel) -> nn.Module:
    return _with_lora(
        model, LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM")
    )


def lora_on_head(model: PreTrainedModel) -> nn.Module:
    """Adapters on the attention's or MLP's linear layers and on the output head."""
    pattern = rf".*\.(q_proj|o_proj|qkv_proj|c_attn|query_key_value)|(.*\.)?{head_name(model)}"
    return _with_lora(model, LoraConfig(r=4, lora_alpha=12, target_modules=pattern, task_type="CAUSAL_LM"))


METHODS: dict[str, Prepare] = {
    "full": train_all,
    "frozen-head": freeze_head,
    "lora": lora_everywhere,
    "lora-on-head": lora_on_head,
}


def flat_and_dense(family: str, method: str) -> tuple[nn.Module, nn.Module]:
    """The same weights twice: with the target forward, and plain with transformers' eager attention."""
    flat, dense = (
        METHODS[method](tiny_model(family, attention)) for attention in ("luthier_segments", "eager")
    )
    install_target_forward(flat.get_base_model() if isinstance(flat, PeftModel) else flat)
    return flat, dense


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of the parameters that train; a missing one is zero."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def assert_same_gradients(
    actual: dict[str, Tensor], expected: dict[str, Tensor], *, relative: float = 1e-5
) -> None:
    """Equal names, and each gradient within `relative` of the largest entry of the whole gradient."""
    assert actual.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    assert scale > 0
    for name, gradient in expected.items():
        difference = float((actual[name] - gradient).abs().max())
        assert difference <= relative * scale, f"{name}: {difference:.3g} of {scale:.3g}"
