"""Scores of the next token -> the token, for each row by its own settings and its own random numbers.

Penalties and cuts are transformers'; here they are put in order. Rows with the same settings are computed together, and
each draws by a number of its own, so that what it gets does not depend on who shares its batch.

Shapes: R rows, G rows with the same settings, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from luthier.generation import GenerationSettings, TokenChoice

_Key = TypeVar("_Key")
_BITS = 40
"""Of a random number: fewer than float64 has, so that its product with a sum is below that sum."""


class _Cuts(NamedTuple):
    """What rows have alike that are drawn together."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float


@dataclass(slots=True)
class Chooser:
    """Chooses the tokens of one answer. `drawn` are those that it has, `bad_scores` as `Generation` says."""

    settings: GenerationSettings
    prompt: tuple[int, ...]
    drawn: list[int] = field(default_factory=list)
    bad_scores: int = 0
    _random: Random = field(init=False)

    def __post_init__(self) -> None:
        seed = self.settings.seed
        if seed is None and self.settings.temperature > 0:
            seed = int(torch.randint(2**62, ()))
        self._random = Random((seed or 0) % 2**64)  # of a negative number it takes the absolute value

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is the choice."""
        return self.settings.temperature == 0 and not self.is_penalized

    @property
    def is_penalized(self) -> bool:
        """Whether its scores depend on the tokens before."""
        settings = self.settings
        penalties = settings.presence_penalty, settings.frequency_penalty
        return settings.repetition_penalty != 1 or any(penalties)

    @property
    def cuts(self) -> _Cuts:
        settings = self.settings
        if settings.temperature == 0:
            return _Cuts(0.0, 0, 1.0, 0.0)
        return _Cuts(settings.temperature, settings.top_k, settings.top_p, settings.min_p)

    def draw(self) -> float:
        """The next random number, from 0 to below 1."""
        return self._random.getrandbits(_BITS) / (1 << _BITS)

    def penalized(self, scores_V: Tensor) -> Tensor:
        """The scores (float32) less its penalties."""
        settings, scores = self.settings, scores_V
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
        return scores.clamp(max=torch.finfo(scores.dtype).max)


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
    best = logits_RV.max(-1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    tokens = [None if value == -torch.inf else token for token, value in pairs]
    for cuts, numbers in _alike(
        choosers, tokens, lambda chooser: None if chooser.is_plain else chooser.cuts
    ).items():
        chosen = _drawn([choosers[number] for number in numbers], _rows(logits_RV, numbers).float(), cuts)
        for number, token in zip(numbers, chosen, strict=True):
            tokens[number] = token
    for chooser, token in zip(choosers, tokens, strict=True):
        if token is not None:
            chooser.drawn.append(token)
    return _choices(choosers, tokens, logits_RV)


def _alike(
    choosers: Sequence[Chooser], tokens: Sequence[int | None], key: Callable[[Chooser], _Key | None]
) -> dict[_Key, list[int]]:
    """The numbers of rows with a token by their key; those without a key are left out."""
    groups: dict[_Key, list[int]] = {}
    for number, (chooser, token) in enumerate(zip(choosers, tokens, strict=True)):
        same = None if token is None else key(chooser)
        if same is not None:
            groups.setdefault(same, []).append(number)
    return groups


def _rows(values_RV: Tensor, numbers: Sequence[int]) -> Tensor:
    return values_RV if len(numbers) == len(values_RV) else values_RV[list(numbers)]


def _drawn(choosers: Sequence[Chooser], scores_GV: Tensor, cuts: _Cuts) -> list[int | None]:
    if any(chooser.is_penalized for chooser in choosers):
        parts = zip(choosers, scores_GV, strict=True)
        scores_GV = torch.stack([chooser.penalized(scores_V) for chooser, scores_V in parts])
    best = scores_GV.max(-1)
    if cuts.temperature == 0:
        tokens_G = best.indices
    else:
        scores_GV = _tempered(scores_GV, cuts.temperature)
        none: Any = torch.empty(len(choosers), 0, dtype=torch.long, device=scores_GV.device)
        sums_GV = _processors(cuts)(none, scores_GV).softmax(-1).cumsum(-1, dtype=torch.float64)
        draws_G1 = torch.tensor([[chooser.draw()] for chooser in choosers], dtype=torch.float64)
        # The first sum above the draw: never that of a token without probability.
        places_G1 = draws_G1.to(sums_GV.device) * sums_GV[:, -1:]
        tokens_G = torch.searchsorted(sums_GV, places_G1, right=True)[:, 0]
    pairs = zip(tokens_G.tolist(), best.values.tolist(), strict=True)
    return [None if value == -torch.inf else token for token, value in pairs]


def _processors(cuts: _Cuts) -> LogitsProcessorList:
    processors = LogitsProcessorList()
    if cuts.top_k:
        processors.append(TopKLogitsWarper(cuts.top_k))
    if cuts.top_p < 1:
        processors.append(TopPLogitsWarper(cuts.top_p))
    if cuts.min_p > 0:
        processors.append(MinPLogitsWarper(cuts.min_p))
    return processors


def _tempered(scores_GV: Tensor, temperature: float) -> Tensor:
    """Scores / temperature, but for what they have in common: the largest of all numbers, divided by a small
    temperature, would be infinite."""
    return scores_GV if temperature == 1 else (scores_GV - scores_GV.amax(-1, keepdim=True)) / temperature


def mended(logits_RV: Tensor) -> Tensor:
    """Scores without NaN, which is ruled out, and infinity, which is the largest number."""
    largest = torch.finfo(logits_RV.dtype).max
    return logits_RV.nan_to_num(nan=-torch.inf, posinf=largest, neginf=-torch.inf)


def _choices(
    choosers: Sequence[Chooser], tokens: Sequence[int | None], logits_RV: Tensor
) -> list[TokenChoice | None]:
    """The tokens with the log-probabilities that their rows ask for."""
    choices = [None if token is None else TokenChoice(token) for token in tokens]
    for (temperature, count), numbers in _alike(choosers, tokens, _asked).items():
        scores_GV = _tempered(_rows(logits_RV, numbers).float(), temperature)
        logprobs_GV = scores_GV.log_softmax(-1)
        own_G1 = torch.tensor([[tokens[number]] for number in numbers], device=logits_RV.device)
        own = logprobs_GV.gather(-1, own_G1)[:, 0].tolist()
        top = logprobs_GV.topk(min(count, logprobs_GV.shape[-1]))
        likeliest = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        for number, logprob, pairs in zip(numbers, own, likeliest, strict=True):
            token = tokens[number]
            assert token is not None
            choices[number] = TokenChoice(token, logprob, tuple(zip(*pairs, strict=True)))
    return choices


def _asked(chooser: Chooser) -> tuple[float, int] | None:
    """The temperature of the log-probabilities that a row asks for, and how many of the likeliest."""
    settings = chooser.settings
    if settings.logprobs is None:
        return None
    return (settings.temperature or 1.0) if settings.logprobs_of == "sampling" else 1.0, settings.logprobs
