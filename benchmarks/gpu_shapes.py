"""Models of real sizes with random weights, made on the device, and rows of random tokens for them.

No file is read. The same seed gives the same weights to every contender, whatever attention it asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from luthier.types import IGNORE_INDEX, Sample

SIGMA = 0.85
"""Standard deviation of the logarithm of alpaca's lengths."""
LONGEST_PROMPT = 40
PAD = 0


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Qwen3 model, and of the rows that it is measured on (tokens)."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    median_length: int = 110
    max_length: int = 1024
    large: bool = False
    """Too large to train in full with float32 weights, or without recomputing activations, on every GPU."""

    def as_config(self) -> dict[str, Any]:
        """The entries of `config.json`."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        }


SHAPES = {
    "tiny": Shape(64, 128, 2, 4, 2, 16, 512, tied=True, median_length=24, max_length=96),
    "0.6B": Shape(1024, 3072, 28, 16, 8, 128, 151936, tied=True),
    "8B": Shape(4096, 12288, 36, 32, 8, 128, 151936, tied=False, large=True),
}
"""`0.6B` and `8B` are the numbers of Qwen3-0.6B's and Qwen3-8B's own configurations."""


def random_model(
    shape: Shape, attention: str, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> PreTrainedModel:
    """Random weights drawn in bfloat16 on the device, then widened: every dtype holds the same numbers."""
    config = Qwen3Config(**shape.as_config())
    torch.manual_seed(seed)
    with device:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.bfloat16)
    assert isinstance(model, PreTrainedModel)
    for parameter in model.parameters():
        # Not `model.to(dtype)`: that rounds the rotary frequencies too, which no loader does.
        parameter.data = parameter.data.to(dtype)
    return model


def random_rows(shape: Shape, count: int, seed: int) -> list[Sample]:
    """Rows with log-normal lengths; the first third, at most 40 tokens, is the prompt and not learnt."""
    rng = np.random.default_rng(seed)
    drawn = np.exp(rng.normal(np.log(shape.median_length), SIGMA, count))
    return rows_of([int(length) for length in drawn.clip(4, shape.max_length)], shape, seed)


def rows_of(lengths: Sequence[int], shape: Shape, seed: int) -> list[Sample]:
    rng = np.random.default_rng(seed)
    rows = []
    for index, length in enumerate(lengths):
        ids = rng.integers(PAD + 1, shape.vocabulary, length).astype(np.int32)
        weights = np.ones(length, np.float32)
        weights[: max(1, min(LONGEST_PROMPT, length // 3))] = 0.0
        rows.append(Sample(ids, weights, source="random", index=index))
    return rows


def num_targets(rows: Sequence[Sample]) -> int:
    return int(sum((row.weights > 0).sum() for row in rows))


def num_tokens(rows: Sequence[Sample]) -> int:
    return sum(map(len, rows))


def padded(rows: Sequence[Sample], device: torch.device) -> dict[str, Tensor]:
    """The rows as transformers takes them: padded on the right to the longest, labels not shifted."""
    longest = max(map(len, rows))
    ids = np.full((len(rows), longest), PAD, np.int64)
    labels = np.full((len(rows), longest), IGNORE_INDEX, np.int64)
    mask = np.zeros((len(rows), longest), np.int64)
    for at, row in enumerate(rows):
        ids[at, : len(row)] = row.input_ids
        mask[at, : len(row)] = 1
        labels[at, : len(row)] = np.where(row.weights > 0, row.input_ids, IGNORE_INDEX)
    arrays = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
