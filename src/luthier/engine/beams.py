"""Beam search, as transformers does it: one prompt at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import LongTensor, Tensor, nn
from transformers import (
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)

from luthier.engine.choosing import mended
from luthier.engine.prompt_inputs import prompt_inputs
from luthier.engine.protocol import Decode
from luthier.generation import Generation, GenerationError, GenerationSettings, Request, TokenChoice


class _Finite:
    """A hook on the model that counts steps with NaN or infinity among the scores, and takes them out.

    Beams are compared by log-probabilities, of which one NaN makes all the others NaN too.
    """

    def __init__(self) -> None:
        self.bad = 0

    def __call__(self, model: nn.Module, inputs: Any, output: Any) -> None:
        logits = output.logits
        if bool((logits.isnan() | logits.isposinf()).any()):
            self.bad += 1
            output.logits = mended(logits)


class _Strings(StoppingCriteria):
    """Ends the beams whose answer has a stop string."""

    def __init__(self, stop: tuple[str, ...], prompt: int, decode: Decode) -> None:
        self.stop, self.prompt, self.decode = stop, prompt, decode

    def __call__(self, input_ids: LongTensor, scores: Any, **kwargs: Any) -> Tensor:
        texts = [self.decode(row) for row in input_ids[:, self.prompt :].tolist()]
        done = [any(stop in text for stop in self.stop) for text in texts]
        return torch.tensor(done, device=input_ids.device)


@torch.inference_mode()
def search_beams(model: nn.Module, request: Request, limit: int, decode: Decode | None) -> Generation:
    """The best of `num_beams` answers. Raises GenerationError for settings that beams do not have."""
    settings, length = request.settings, len(request.prompt)
    for name in ("logprobs", "presence_penalty", "frequency_penalty"):
        if getattr(settings, name):
            raise GenerationError(f"{name} does not go with num_beams={settings.num_beams}")
    sampled = settings.temperature > 0
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=limit,
        num_beams=settings.num_beams,
        length_penalty=settings.length_penalty,
        repetition_penalty=settings.repetition_penalty,
        do_sample=sampled,
        **(_cuts(settings) if sampled else {}),
        eos_token_id=list(settings.stop_ids) or None,
        pad_token_id=settings.stop_ids[0] if settings.stop_ids else 0,
    )
    finite = _Finite()
    stopping = StoppingCriteriaList()
    if settings.stop and decode is not None:
        stopping.append(_Strings(settings.stop, length, decode))
    device = next(model.parameters()).device
    read = prompt_inputs(model, [request])
    hook = model.register_forward_hook(finite)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), hook:
        if settings.seed is not None:
            torch.manual_seed(settings.seed)
        output = model.generate(  # type: ignore[operator]
            input_ids=read.ids_PL,
            attention_mask=read.mask_PL,
            **read.media,
            generation_config=config,
            stopping_criteria=stopping,
        )
    return _ended(request, output[0, length:].tolist(), limit, finite.bad, decode)


def _cuts(settings: GenerationSettings) -> dict[str, Any]:
    return {
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "min_p": settings.min_p or None,
    }


def _ended(request: Request, ids: list[int], limit: int, bad: int, decode: Decode | None) -> Generation:
    """The answer up to its stop token, without what stands behind it."""
    settings = request.settings
    for position, token in enumerate(ids):
        if token in settings.stop_ids:
            before = tuple(map(TokenChoice, ids[:position]))
            return Generation(before, "stop", token, bad, TokenChoice(token))
    choices = tuple(map(TokenChoice, ids))
    text = decode(ids) if settings.stop and decode is not None else ""
    found = [(text.index(stop), stop) for stop in settings.stop if stop in text]
    if found:
        return Generation(choices, "stop", min(found)[1], bad)
    return Generation(choices, "length" if len(ids) >= limit else "stop", None, bad)
