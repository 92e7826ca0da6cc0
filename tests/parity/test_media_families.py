"""More families that see and hear, their numbers by hand: rows together against `generate` of transformers alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Glm4vConfig, PreTrainedConfig, Qwen2VLConfig, Qwen3VLConfig

from luthier.engine.hf import HfEngine
from luthier.types import GenerationSettings, Media, Request
from tests.multimodal import (
    _ROPE,
    _TEXT,
    MULTIMODAL,
    PLACEHOLDER,
    Picture,
    _random_model,
    media_sample,
    picture,
)

SETTINGS = GenerationSettings(max_new_tokens=8, stop_ids=(2,), logprobs=0)
_MARKS = {
    "image_token_id": PLACEHOLDER,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
    "tie_word_embeddings": False,
}
_TOWER = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 14}


def _qwen2() -> PreTrainedConfig:
    tower = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    return Qwen2VLConfig(text_config={**_TEXT, "rope_parameters": _ROPE}, vision_config=tower, **_MARKS)


def _qwen3() -> PreTrainedConfig:
    tower = {**_TOWER, "out_hidden_size": 32, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    rope = {**_ROPE, "mrope_interleaved": True}
    return Qwen3VLConfig(text_config={**_TEXT, "rope_parameters": rope}, vision_config=tower, **_MARKS)


def _glm() -> PreTrainedConfig:
    marks = _MARKS | {"image_start_token_id": 92, "image_end_token_id": 93}
    rope = {**_ROPE, "partial_rotary_factor": 1.0}
    tower = {**_TOWER, "out_hidden_size": 32, "image_size": 56}
    return Glm4vConfig(text_config={**_TEXT, "rope_parameters": rope}, vision_config=tower, **marks)


FAMILIES: dict[str, tuple[str, Callable[[], PreTrainedConfig]]] = {
    "qwen2-audio": ("qwen2-audio", MULTIMODAL["qwen2-audio"]),
    "qwen2-vl": ("qwen2.5-vl", _qwen2),
    "qwen3-vl": ("qwen2.5-vl", _qwen3),
    "glm-4v": ("qwen2.5-vl", _glm),
}
"""Whose numbers they take, and their config."""


class Opener:
    """Opens pictures that were made before, by their names."""

    def __init__(self, pictures: dict[str, Picture], *, marks: bool) -> None:
        self.pictures, self.marks = pictures, marks

    def __call__(self, media: Sequence[Media], input_ids: Tensor) -> dict[str, Tensor]:
        found = [self.pictures[str(one.source)].tensors for one in media]
        tensors = {name: torch.cat([one[name] for one in found]) for name in found[0]}
        return tensors | ({"mm_token_type_ids": (input_ids == PLACEHOLDER).long()} if self.marks else {})

    def token_ids(self) -> frozenset[int]:
        return frozenset({PLACEHOLDER})


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_together_answer_as_generate_does_alone(family: str) -> None:
    kind, config = FAMILIES[family]
    model: Any = _random_model(config()).eval()
    pictures = {str(seed): picture(kind, seed, size) for seed, size in ((1, 0), (2, 1), (3, 2), (4, 1))}
    opener = Opener(pictures, marks=kind == "qwen2.5-vl")
    requests = []
    for row, names in enumerate((["1"], [], ["2", "3"], ["4"])):
        sample = media_sample(kind, [pictures[name] for name in names], (3 + row, 2 + 2 * row, 2), row)
        media = tuple(Media("image", name) for name in names)
        requests.append(Request(tuple(sample.input_ids.tolist()), SETTINGS, media=media, opener=opener))
    engine = HfEngine(model, rows=3)
    answers = dict(engine.answers(requests))
    assert engine._together
    lengths = []
    for row, request in enumerate(requests):
        ids = torch.tensor([request.prompt])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=SETTINGS.max_new_tokens,
            do_sample=False,
            eos_token_id=[2],
            return_dict_in_generate=True,
            output_logits=True,
            **(opener(request.media, ids) if request.media else {}),
        )
        tokens = out.sequences[0, ids.shape[1] :].tolist()
        scores = zip(out.logits, tokens, strict=True)
        expected = [float(logits_1V[0].log_softmax(-1)[token]) for logits_1V, token in scores]
        answer = answers[row]
        choices = [*answer.choices, *([answer.stop] if answer.stop is not None else [])]
        assert [choice.token for choice in choices] == tokens
        assert [choice.logprob for choice in choices] == pytest.approx(expected, abs=2e-5)
        lengths.append(len(tokens))
    assert max(lengths) > 4
