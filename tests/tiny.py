"""Tiny random models of the families that the tests speak of, and batches for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from luthier.types import Sample

VOCAB = 97
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OLD = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SHAPE),
    "llama-tied": lambda: LlamaConfig(**_SHAPE, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**_SHAPE),
    "qwen3": lambda: Qwen3Config(**_SHAPE),
    "qwen3-moe": lambda: Qwen3MoeConfig(
        **_SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "mistral-window": lambda: MistralConfig(**_SHAPE, sliding_window=5),
    "gemma2-softcap": lambda: Gemma2Config(
        **_SHAPE, sliding_window=5, attn_logit_softcapping=2.0, final_logit_softcapping=1.5
    ),
    "gemma3-window": lambda: Gemma3TextConfig(
        **_SHAPE,
        sliding_window=5,
        final_logit_softcapping=1.5,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi": lambda: PhiConfig(**_SHAPE),
    "phi3": lambda: Phi3Config(**_SHAPE),
    "granite-scaled": lambda: GraniteConfig(**_SHAPE, logits_scaling=3.0),
    "cohere-scaled": lambda: CohereConfig(**_SHAPE, logit_scale=0.3),
    "gpt2": lambda: GPT2Config(**_OLD, n_embd=32, n_layer=2, n_head=4, n_positions=256),
    "neox": lambda: GPTNeoXConfig(
        **_OLD, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    ),
    "opt": lambda: OPTConfig(
        **_OLD, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    ),
}


def tiny_model(family: str, attention: str = "luthier_segments", seed: int = 0) -> PreTrainedModel:
    """A float32 model with large random weights, so that a wrong mask or cap shows in every number."""
    import luthier.model.attention  # noqa: F401  registers the attention's name

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](), attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8.0)
    return model


def random_samples(lengths: Sequence[int], seed: int = 0, vocab_size: int = VOCAB) -> list[Sample]:
    """Samples of random tokens; about half of the tokens are targets, with unequal weights."""
    rng = np.random.default_rng(seed)
    samples = []
    for index, length in enumerate(lengths):
        ids = rng.integers(3, vocab_size, length).astype(np.int32)
        weights = rng.choice([0.0, 1.0, 0.5], length, p=[0.5, 0.35, 0.15]).astype(np.float32)
        weights[0] = 0.0
        samples.append(Sample(ids, weights, source="random", index=index))
    return samples


def random_pairs(
    shapes: Sequence[tuple[int, int, int]], seed: int = 0, vocab_size: int = VOCAB
) -> list[Sample]:
    """Pairs of random tokens; each shape is the tokens of prompt, better answer and worse answer."""
    rng = np.random.default_rng(seed)
    pairs = []
    for index, (prompt, chosen, rejected) in enumerate(shapes):
        ids = rng.integers(3, vocab_size, prompt + chosen + rejected).astype(np.int32)
        weights = np.repeat(np.float32([0, 1]), [prompt, chosen + rejected])
        pairs.append(Sample(ids, weights, "random", index, (prompt, prompt + chosen)))
    return pairs


def random_answers(
    shapes: Sequence[tuple[int, int, bool]], seed: int = 0, vocab_size: int = VOCAB
) -> list[Sample]:
    """Single answers of random tokens; each shape is the tokens of prompt and answer, and whether it is desirable."""
    rng = np.random.default_rng(seed)
    answers = []
    for index, (prompt, answer, desirable) in enumerate(shapes):
        ids = rng.integers(3, vocab_size, prompt + answer).astype(np.int32)
        weights = np.repeat(np.float32([0, 1]), [prompt, answer])
        answers.append(Sample(ids, weights, "random", index, (prompt,), float(desirable)))
    return answers


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 260 ids with a ChatML template: any text, no download."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        token: index for index, token in enumerate(["<|pad|>", "<|im_start|>", "<|im_end|>", *alphabet])
    }
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )


def chat_model(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A tiny random model with its tokenizer, saved as a user would have it on disk."""
    tokenizer = chat_tokenizer()
    config = FAMILIES[family]()
    config.vocab_size, config.eos_token_id = len(tokenizer), tokenizer.eos_token_id
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_alpaca(file: Path, num_rows: int) -> None:
    """Short made-up rows in alpaca format."""
    rng = np.random.default_rng(0)
    rows = [
        {"instruction": f"Count to {n}.", "input": "", "output": " ".join(str(i) for i in range(1, n + 1))}
        for n in rng.integers(2, 12, num_rows).tolist()
    ]
    file.write_text(json.dumps(rows), encoding="utf-8")


def write_pairs(file: Path, num_rows: int, seed: int = 0) -> None:
    """Made-up pairs in alpaca format: counting up is better than counting down."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in rng.integers(2, 9, num_rows).tolist():
        up = [str(i) for i in range(1, number + 1)]
        rows.append(
            {
                "instruction": f"Count to {number}, row {len(rows)}.",
                "input": "",
                "chosen": " ".join(up),
                "rejected": " ".join(reversed(up)) + ".",
            }
        )
    file.write_text(json.dumps(rows), encoding="utf-8")


def write_feedback(file: Path, num_rows: int, seed: int = 0) -> None:
    """Made-up answers in alpaca format, each with a label."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in rng.integers(2, 9, num_rows).tolist():
        up = [str(i) for i in range(1, number + 1)]
        good = len(rows) % 3 != 0
        text = " ".join(up if good else reversed(up))
        rows.append({"instruction": f"Count to {number}, row {len(rows)}.", "output": text, "label": good})
    file.write_text(json.dumps(rows), encoding="utf-8")


PAIR_COLUMNS: dict[str, Any] = {"ranking": True, "columns": {"chosen": "chosen", "rejected": "rejected"}}
"""What a data set description says of a file that `write_pairs` wrote."""
FEEDBACK_COLUMNS: dict[str, Any] = {"columns": {"kto_tag": "label"}}
