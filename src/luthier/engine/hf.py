"""Generation over transformers: prompts as token ids in, answers as token ids out; nothing of training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel

from luthier.types import GenerationSettings


class HfEngine:
    """Batched generation with left padding on a loaded model, with or without adapters."""

    def __init__(self, model: PreTrainedModel, *, batch_size: int = 8) -> None:
        self._model = model
        self._batch_size = batch_size

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], settings: GenerationSettings) -> list[list[int]]:
        """The answer to each prompt, in order, without its stop token.

        Prompts of like length go together, so that little is padded; the answers' order is the prompts'.
        """
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        answers: list[list[int]] = [[] for _ in prompts]
        training = self._model.training
        self._model.eval()  # type: ignore[no-untyped-call]
        try:
            for start in range(0, len(order), self._batch_size):
                indices = order[start : start + self._batch_size]
                batch = self._batch([prompts[index] for index in indices], settings)
                for index, answer in zip(indices, batch, strict=True):
                    answers[index] = answer
        finally:
            self._model.train(training)
        return answers

    def _batch(self, prompts: Sequence[Sequence[int]], settings: GenerationSettings) -> list[list[int]]:
        width = max(len(prompt) for prompt in prompts)
        pad = settings.stop_ids[0] if settings.stop_ids else 0
        device = self._model.device
        ids = torch.tensor(
            [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device
        )
        mask = torch.tensor(
            [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device
        )
        if settings.seed is not None:
            torch.manual_seed(settings.seed)
        output = self._model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=mask, generation_config=_generation_config(settings, pad)
        )
        return [_until_stop(row, settings.stop_ids) for row in output[:, width:].tolist()]


def _generation_config(settings: GenerationSettings, pad: int) -> GenerationConfig:
    sampled = settings.temperature > 0
    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=settings.max_new_tokens,
        do_sample=sampled,
        temperature=settings.temperature if sampled else None,
        top_p=settings.top_p if sampled else None,
        eos_token_id=list(settings.stop_ids) or None,
        pad_token_id=pad,
    )


def _until_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    """The ids before the first stop token."""
    for position, token in enumerate(ids):
        if token in stop_ids:
            return ids[:position]
    return ids
