"""Tiny random models that read images, and flat batches for them by hand: no processor, no data pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForMultimodalLM,
    Gemma3Config,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2AudioConfig,
)

from luthier.data.collate import branch_batch, flat_batch
from luthier.types import Batch, Sample
from tests.media import Kind, tiny_processor, tiny_sound_processor

VOCAB = 97
PLACEHOLDER = 90
_TEXT = {
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
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def _qwen() -> PreTrainedConfig:
    return Qwen2_5_VLConfig(
        text_config={**_TEXT, "rope_parameters": _ROPE},
        vision_config={
            "depth": 2,  # as many as the language model has, which no search for layers may mistake
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 14,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        image_token_id=PLACEHOLDER,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
        tie_word_embeddings=False,
    )


def _gemma() -> PreTrainedConfig:
    return Gemma3Config(
        text_config={**_TEXT, "sliding_window": 16},
        vision_config={**_TOWER, "image_size": 28, "patch_size": 7},
        mm_tokens_per_image=4,
        image_token_index=PLACEHOLDER,
        boi_token_index=92,
        eoi_token_index=93,
    )


def _llava() -> PreTrainedConfig:
    return LlavaConfig(
        text_config={**_TEXT, "model_type": "llama"},
        vision_config={**_TOWER, "model_type": "clip_vision_model", "image_size": 28, "patch_size": 14},
        image_token_index=PLACEHOLDER,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def _audio() -> PreTrainedConfig:
    return Qwen2AudioConfig(
        text_config={**_TEXT, "model_type": "qwen2"},
        audio_config={
            "num_mel_bins": 8,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "d_model": 16,
            "max_source_positions": 16,
        },
        audio_token_index=PLACEHOLDER,
    )


KINDS: dict[str, Kind] = {"qwen2.5-vl": "qwen2_5_vl", "gemma3": "gemma3", "llava": "llava"}
"""The families whose processors `tests.media` makes."""


def media_model(folder: Path, family: str) -> Path:
    """A tiny model with its processor in `folder`, as a hub has them; the smallest weights that still see."""
    hears = family == "qwen2-audio"
    processor: Any = tiny_sound_processor(folder) if hears else tiny_processor(KINDS[family], folder)
    tokenizer = processor.tokenizer
    config, ids = MULTIMODAL[family](), tokenizer.convert_tokens_to_ids
    text = config.get_text_config()
    text.vocab_size = len(tokenizer)
    for one in (config, text):
        one.pad_token_id, one.bos_token_id, one.eos_token_id = 0, 1, tokenizer.eos_token_id
    text.max_position_embeddings = 512
    if hears:
        config.audio_config.max_source_positions = 50  # those of a second
    marks = {
        "qwen2.5-vl": {
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        },
        "gemma3": {
            "image_token_id": "<image_soft_token>",
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
        },
        "llava": {"image_token_id": "<image>"},
        "qwen2-audio": {"audio_token_id": "<|AUDIO|>"},
    }
    for name, token in marks[family].items():
        assert hasattr(config, name), name
        setattr(config, name, ids(token))
    _random_model(config).save_pretrained(folder)
    return folder


MULTIMODAL: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen2.5-vl": _qwen,
    "gemma3": _gemma,
    "llava": _llava,
    "qwen2-audio": _audio,
}


def tiny_multimodal(family: str, seed: int = 0) -> PreTrainedModel:
    """A float32 model with large random weights, so that an image at the wrong place shows in every number."""
    return _random_model(MULTIMODAL[family](), seed)


def _random_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForMultimodalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                # Gemma 3's projection starts as zeros, with which it sees nothing.
                parameter.normal_(std=0.05) if not parameter.any() else None
                parameter.mul_(4.0)
    return model


@dataclass(frozen=True)
class Picture:
    """One image, or sound: how many placeholders it has, and what the model's forward takes of it."""

    tokens: int
    tensors: dict[str, Tensor]


def picture(family: str, seed: int, size: int = 0) -> Picture:
    """Random pixels as the family's processor hands them over; `size` varies the number of patches of Qwen2.5-VL."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if family == "qwen2.5-vl":
        height, width = 4, 4 + 2 * size
        patches = random(height * width, 3 * 2 * 14 * 14)
        grid = torch.tensor([[1, height, width]])
        return Picture(height * width // 4, {"pixel_values": patches, "image_grid_thw": grid})
    if family == "qwen2-audio":
        mask = torch.ones(1, 32, dtype=torch.long)
        return Picture(8, {"input_features": random(1, 8, 32), "feature_attention_mask": mask})
    return Picture(4, {"pixel_values": random(1, 3, 28, 28)})


def media_sample(
    family: str, pictures: Sequence[Picture], lengths: tuple[int, int, int], index: int = 0
) -> Sample:
    """Text, the pictures, text, and an answer that is all targets; `lengths` of these texts and of the answer."""
    rng = np.random.default_rng(index)
    first, second, answer = (rng.integers(3, 80, length) for length in lengths)
    # Between marks, as every processor writes them: two images side by side would be one to Qwen2.5-VL.
    shown = [np.array([92, *[PLACEHOLDER] * one.tokens, 93]) for one in pictures]
    ids = np.concatenate([first, *shown, second, answer]).astype(np.int32)
    weights = np.zeros(len(ids), np.float32)
    weights[-len(answer) :] = 1.0
    return Sample(ids, weights, "pictures", index)


_MARKS = {"qwen2.5-vl": "mm_token_type_ids", "gemma3": "token_type_ids"}


def with_media(batch: Batch, family: str, pictures: Sequence[Picture]) -> Batch:
    """The batch with the pictures of its segments, in their order."""
    if pictures:
        names = pictures[0].tensors
        batch.media = {name: torch.cat([one.tensors[name] for one in pictures]) for name in names}
        if family in _MARKS:
            batch.media[_MARKS[family]] = (batch.input_ids == PLACEHOLDER).long()
    return batch


@dataclass(frozen=True)
class Rows:
    """Samples, each with its pictures."""

    family: str
    samples: list[Sample]
    pictures: list[list[Picture]]

    def batch(self) -> Batch:
        return with_media(flat_batch(self.samples), self.family, list(chain(*self.pictures)))

    def alone(self) -> list[dict[str, Any]]:
        """Each row as transformers' own forward takes it, with labels."""
        rows = []
        for sample, pictures in zip(self.samples, self.pictures, strict=True):
            batch = with_media(flat_batch([sample]), self.family, pictures)
            ids = batch.input_ids
            labels = torch.where(torch.from_numpy(sample.weights)[None] > 0, ids, -100)
            rows.append(
                {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **batch.media}
            )
        return rows


def some_rows(family: str) -> Rows:
    """One picture, none, two of unequal size; texts of unequal length."""
    pictures = [[picture(family, 1)], [], [picture(family, 2, 1), picture(family, 3, 2)]]
    lengths = [(3, 2, 5), (4, 3, 3), (1, 6, 4)]
    samples = [
        media_sample(family, shown, shape, index)
        for index, (shown, shape) in enumerate(zip(pictures, lengths, strict=True))
    ]
    return Rows(family, samples, pictures)


def some_pairs(family: str) -> tuple[Batch, list[dict[str, Any]]]:
    """Two pairs as a batch, one of them with pictures, and each of its rows as transformers' forward takes it."""
    pictures = [[picture(family, 4, 1)], []]
    pairs, rows = [], []
    for index, shown in enumerate(pictures):
        chosen = media_sample(family, shown, (3, 2, 4), index)
        rejected = np.random.default_rng(index + 9).integers(3, 80, 6).astype(np.int32)
        prompt = len(chosen) - 4
        pairs.append(
            Sample(
                np.concatenate((chosen.input_ids, rejected)),
                np.concatenate((chosen.weights, np.ones(6, np.float32))),
                "pairs",
                index,
                (prompt, len(chosen)),
            )
        )
    batch = with_media(branch_batch(pairs, share_prompts=False), family, pictures[0] + pictures[0])
    for k in range(2):
        for pair, shown in zip(pairs, pictures, strict=True):
            prompt, chosen = pair.branches
            answer = slice(prompt, chosen) if k == 0 else slice(chosen, len(pair))
            ids = np.concatenate((pair.input_ids[:prompt], pair.input_ids[answer]))
            weights = np.concatenate((pair.weights[:prompt], pair.weights[answer]))
            rows += Rows(family, [Sample(ids, weights)], [shown]).alone()
    return batch, rows
