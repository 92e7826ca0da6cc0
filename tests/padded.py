"""Tiny random models whose segments cannot be kept apart in one row: recurrent, convolutional, own attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    BloomConfig,
    FalconConfig,
    GptOssConfig,
    JambaConfig,
    Lfm2Config,
    Mamba2Config,
    MambaConfig,
    MptConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3NextConfig,
    RwkvConfig,
)

from luthier.model.attention import SDPA, NotIsolatedError
from luthier.model.selftest import build_with_rows
from tests.tiny import VOCAB, chat_tokenizer

_OLD = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SHAPE = {
    **_OLD,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_HEADS = {"head_dim": 8}
_SSM = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 16,
}

PADDED: dict[str, Callable[[], PreTrainedConfig]] = {
    "mamba": lambda: MambaConfig(**_OLD, hidden_size=32, num_hidden_layers=2, state_size=8),
    "mamba2": lambda: Mamba2Config(
        **_OLD,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
        num_heads=8,
        head_dim=8,
        expand=2,
        n_groups=2,
        chunk_size=16,
    ),
    "bloom": lambda: BloomConfig(**_OLD, hidden_size=32, n_layer=2, n_head=4),
    "falcon": lambda: FalconConfig(**_OLD, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "mpt": lambda: MptConfig(**_OLD, d_model=32, n_layers=2, n_heads=4, max_seq_len=256),
    "jamba": lambda: JambaConfig(
        **_SHAPE,
        num_experts=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
    ),
    "bamba": lambda: BambaConfig(**_SHAPE, **_HEADS, **_SSM, attn_layer_indices=[1]),
    "qwen3-next": lambda: Qwen3NextConfig(
        **_SHAPE,
        **_HEADS,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"],
    ),
    "lfm2": lambda: Lfm2Config(**_SHAPE, **_HEADS, layer_types=["conv", "full_attention"]),
    "gpt-oss": lambda: GptOssConfig(
        **_SHAPE, **_HEADS, num_local_experts=4, num_experts_per_tok=2, sliding_window=8
    ),
    "rwkv": lambda: RwkvConfig(
        **_OLD, hidden_size=32, num_hidden_layers=2, context_length=256, attention_hidden_size=32
    ),
}


def own_model(family: str, attention: str | None = None, seed: int = 0) -> PreTrainedModel:
    """A float32 model with its own attention and large random weights, so that a leak shows in every number."""
    torch.manual_seed(seed)
    chosen = {} if attention is None else {"attn_implementation": attention}
    model = AutoModelForCausalLM.from_config(PADDED[family](), **chosen)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    return model


def builder(family: str) -> Callable[[bool], PreTrainedModel]:
    """What `build_with_rows` asks for a model; like `load_model` where the attention cannot be chosen."""

    def build(own_attention: bool) -> PreTrainedModel:
        try:
            return own_model(family, None if own_attention else SDPA)
        except KeyError as error:
            raise NotIsolatedError(f"{family} does not let its attention be chosen") from error

    return build


def padded_model(family: str, side: str = "right") -> PreTrainedModel:
    """The model as a run would have it: the target forward installed, rows padded."""
    model = build_with_rows(builder(family), "auto", side)  # type: ignore[arg-type]
    assert isinstance(model, PreTrainedModel)
    return model


def padded_chat_model(folder: Path, family: str) -> Path:
    """A tiny model with its tokenizer, saved as a user would have it on disk."""
    tokenizer = chat_tokenizer()
    config = PADDED[family]()
    config.vocab_size, config.eos_token_id = len(tokenizer), tokenizer.eos_token_id
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
