"""How many parameters a model has, of which kind, and how many of them train."""

from __future__ import annotations

import re

from torch import nn

from luthier.methods.adapter_files import PARTS
from luthier.methods.groups import ParameterCount
from luthier.model.quantized_layers import packed_weights
from luthier.model.value_head import value_head

KINDS = ("embeddings", "attention", "mlp", "norm", "mixer", "head", "adapter", "other")
"""In the order in which they are shown. A tied head is the embeddings, a value head a head; `mixer` is what recurrent
layers have."""

_ADAPTER = re.compile("|".join(re.escape(part) for part in PARTS))
_NAMES = (
    ("attention", re.compile(r"attn|attention")),
    ("mlp", re.compile(r"mlp|feed_?forward|ffn|expert|moe|(?:^|\.)fc\d?(?:$|\.)")),
    ("mixer", re.compile(r"mixer|mamba|ssm|recurrent|conv1d")),
    ("norm", re.compile(r"norm|(?:^|\.)ln_?\w*(?:$|\.)")),
    ("embeddings", re.compile(r"embed|(?:^|\.)w[tp]e(?:$|\.)")),
)


def count_by_kind(model: nn.Module) -> dict[str, ParameterCount]:
    """Parameters by kind, in the order of KINDS, kinds without any left out; tied ones count once."""
    embeddings = {id(parameter) for parameter in _parameters(model, "get_input_embeddings")}
    scoring = value_head(model)
    heads = [
        *_parameters(model, "get_output_embeddings"),
        *(scoring.parameters() if scoring is not None else ()),
    ]
    head = {id(parameter) for parameter in heads} - embeddings
    modules = dict(model.named_modules())
    total, trainable = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    for name, parameter in model.named_parameters():
        if _ADAPTER.search(f".{name}."):
            kind = "adapter"
        elif id(parameter) in embeddings:
            kind = "embeddings"
        elif id(parameter) in head:
            kind = "head"
        else:
            kind = _kind(name, modules[name.rpartition(".")[0]])
        total[kind] += packed_weights(modules[name.rpartition(".")[0]], parameter)
        trainable[kind] += parameter.numel() * parameter.requires_grad
    return {kind: ParameterCount(trainable[kind], total[kind]) for kind in KINDS if total[kind]}


def _parameters(model: nn.Module, getter: str) -> list[nn.Parameter]:
    module = getattr(model, getter)()
    return list(module.parameters()) if isinstance(module, nn.Module) else []


def _kind(name: str, module: nn.Module) -> str:
    """By the class for what has a plain one, else by the innermost part of the name that says something."""
    if "norm" in type(module).__name__.lower():
        return "norm"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    for part in reversed(name.lower().split(".")[:-1]):
        for kind, pattern in _NAMES:
            if pattern.search(part):
                return kind
    return "other"
