"""Scores of the next token -> the token, for each row by its own settings and its own random numbers.

Penalties and cuts are transformers'; here they are put in order, and each row draws by itself, so that what it gets
does not depend on who shares its batch.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from luthier.generation import GenerationSettings, TokenChoice


@dataclass(slots=True)
class Chooser:
    """Chooses the tokens of one answer. `drawn` are those that it has, `bad_scores` as `Generation` says."""

    settings: GenerationSettings
    prompt: tuple[int, ...]
    device: torch.device
    drawn: list[int] = field(default_factory=list)
    bad_scores: int = 0
    _generator: torch.Generator | None = None
    _cuts: LogitsProcessorList | None = None

    def __post_init__(self) -> None:
        settings = self.settings
        if settings.temperature > 0:
            seed = settings.seed if settings.seed is not None else int(torch.randint(2**62, ()))
            self._generator = torch.Generator(self.device).manual_seed(seed)
        cuts = LogitsProcessorList()
        if settings.temperature not in (0.0, 1.0):
            cuts.append(TemperatureLogitsWarper(settings.temperature))
        if settings.temperature > 0 and settings.top_k:
            cuts.append(TopKLogitsWarper(settings.top_k))
        if settings.temperature > 0 and settings.top_p < 1:
            cuts.append(TopPLogitsWarper(settings.top_p))
        if settings.temperature > 0 and settings.min_p > 0:
            cuts.append(MinPLogitsWarper(settings.min_p))
        self._cuts = cuts

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is the choice."""
        settings = self.settings
        penalties = settings.presence_penalty, settings.frequency_penalty
        return settings.temperature == 0 and settings.repetition_penalty == 1 and not any(penalties)

    def choose(self, logits_V: Tensor) -> int | None:
        """The next token; None where no score is a number."""
        scores = self._penalized(logits_V)[None]
        assert self._cuts is not None
        none: Any = torch.empty(1, 0, dtype=torch.long, device=scores.device)
        scores = self._cuts(none, scores)
        if not bool((scores > -torch.inf).any()):
            return None
        if self._generator is None:
            return int(scores.argmax())
        return int(torch.multinomial(scores[0].softmax(-1), 1, generator=self._generator))

    def _penalized(self, logits_V: Tensor) -> Tensor:
        settings, scores = self.settings, logits_V.float()
        if settings.repetition_penalty != 1:
            seen = torch.tensor([[*self.prompt, *self.drawn]], device=scores.device)
            penalty = RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)
            scores = penalty(seen, scores[None])[0]
        if self.drawn and (settings.presence_penalty or settings.frequency_penalty):
            counts = Counter(self.drawn)
            tokens = torch.tensor(list(counts), device=scores.device)
            times = torch.tensor(list(counts.values()), device=scores.device, dtype=scores.dtype)
            scores = scores.clone()
            scores[tokens] -= settings.presence_penalty + settings.frequency_penalty * times
        return scores


def choose_rows(choosers: Sequence[Chooser], logits_RV: Tensor) -> list[TokenChoice | None]:
    """The next token of every row; None where a row has no number among its scores.

    NaN is never chosen, infinity counts as the largest number; rows with either are counted. Minus infinity is how
    models rule tokens out.
    """
    bad_R = (logits_RV.isnan() | logits_RV.isposinf()).any(-1)
    if bool(bad_R.any()):
        for chooser, bad in zip(choosers, bad_R.tolist(), strict=True):
            chooser.bad_scores += bad
        logits_RV = mended(logits_RV)
    likeliest = logits_RV.argmax(-1).tolist()
    dead = (logits_RV.amax(-1) == -torch.inf).tolist()
    choices: list[TokenChoice | None] = []
    for number, chooser in enumerate(choosers):
        token: int | None = likeliest[number]
        if dead[number]:
            token = None
        elif not chooser.is_plain:
            token = chooser.choose(logits_RV[number])
        if token is not None:
            chooser.drawn.append(token)
        choices.append(None if token is None else _choice(chooser.settings, token, logits_RV[number]))
    return choices


def mended(logits_RV: Tensor) -> Tensor:
    """Scores without NaN, which is ruled out, and infinity, which is the largest number."""
    largest = torch.finfo(logits_RV.dtype).max
    return logits_RV.nan_to_num(nan=-torch.inf, posinf=largest, neginf=-torch.inf)


def _choice(settings: GenerationSettings, token: int, logits_V: Tensor) -> TokenChoice:
    if settings.logprobs is None:
        return TokenChoice(token)
    scores_V = logits_V.float()
    if settings.logprobs_of == "sampling" and settings.temperature > 0:
        # The largest is taken off first: the largest of all numbers, divided by a small temperature, is infinite.
        scores_V = (scores_V - scores_V.amax()) / settings.temperature
    logprobs_V = scores_V.log_softmax(-1)
    top = logprobs_V.topk(min(settings.logprobs, len(logprobs_V)))
    pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return TokenChoice(token, float(logprobs_V[token]), pairs)
