"""What a model says of probes: log-probabilities of every next token and greedy answers, or scores; and how far two
models are apart in them.

Shapes: K positions of one probe, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from luthier.exporting.probes import Probe
from luthier.model.rows import padded_media
from luthier.types import Engine, GenerationSettings, ModelKind, Request

EngineOf = Callable[[Any], Engine]
"""Makes the engine that generates with a model."""

GREEDY_TOKENS = 16

_NUMBERS = 2**27
"""Logits that are kept of one model, over all probes: half a GiB in float32."""


@dataclass(frozen=True, slots=True)
class Answers:
    """Of each probe: `logits` (K, V) float32 at its last K positions, `greedy` tokens; of reward models `scores`.

    `sequences` are what the logits are of: the probes, and their prompts with the greedy tokens after them; `shown`
    the probe of each, for its media.
    """

    sequences: tuple[tuple[int, ...], ...]
    shown: tuple[Probe, ...]
    logits: tuple[Tensor, ...] = ()
    greedy: tuple[tuple[int, ...], ...] = ()
    scores: tuple[float, ...] = ()


@torch.no_grad()
def ask(
    model: Any,
    probes: Sequence[Probe],
    kind: ModelKind,
    engine_of: EngineOf,
    stop_ids: Sequence[int],
    like: Answers | None = None,
) -> Answers:
    """The answers of a model, its own greedy tokens among them.

    The logits are at the same sequences as in `like`, where given.
    """
    if kind == "reward":
        sequences = tuple(probe.ids for probe in probes)
        return Answers(sequences, tuple(probes), scores=_scores(model, sequences, probes))
    made = dict(engine_of(model).answers([_asked(probe, stop_ids) for probe in probes]))
    greedy = [made[number].ids for number in range(len(probes))]
    sequences = (
        *(probe.ids for probe in probes),
        *((*probe.prompt, *answer) for probe, answer in zip(probes, greedy, strict=True)),
    )
    if like is not None:
        sequences = like.sequences
    shown = (*probes, *probes)
    logits = _all_logits(model, sequences, shown)
    return Answers(sequences, shown, logits, tuple(tuple(answer) for answer in greedy))


def _asked(probe: Probe, stop_ids: Sequence[int]) -> Request:
    """An answer to media ends at a token that would stand for another one: nothing is there to be seen in its place."""
    placeholders = probe.opener.token_ids() if probe.media and probe.opener is not None else ()
    settings = GenerationSettings(max_new_tokens=GREEDY_TOKENS, stop_ids=(*stop_ids, *placeholders))
    return Request(probe.prompt, settings, media=probe.media, opener=probe.opener)


@torch.no_grad()
def only_logits(model: Any, like: Answers, kind: ModelKind) -> Answers:
    """What a model says of the sequences of `like`, without answers of its own."""
    if kind == "reward":
        return Answers(like.sequences, like.shown, scores=_scores(model, like.sequences, like.shown))
    return Answers(like.sequences, like.shown, _all_logits(model, like.sequences, like.shown))


def _scores(model: Any, sequences: Sequence[Sequence[int]], shown: Sequence[Probe]) -> tuple[float, ...]:
    pairs = zip(sequences, shown, strict=True)
    return tuple(float(_output(model, ids, probe)[0, 0]) for ids, probe in pairs)


def _all_logits(model: Any, sequences: Sequence[Sequence[int]], shown: Sequence[Probe]) -> tuple[Tensor, ...]:
    logits = []
    for ids, probe in zip(sequences, shown, strict=True):
        logits_KV = _output(model, ids, probe)[0]
        kept = max(GREEDY_TOKENS + 1, _NUMBERS // (logits_KV.shape[1] * len(sequences)))
        logits.append(logits_KV[-kept:].float().cpu())
    return tuple(logits)


def _output(model: Any, ids: Sequence[int], probe: Probe) -> Tensor:
    row = torch.tensor([list(ids)], device=model.device)
    media = _opened([ids], [probe], model.device)
    logits: Tensor = model(
        input_ids=row, attention_mask=torch.ones_like(row), use_cache=False, **media
    ).logits
    return logits


def _opened(
    sequences: Sequence[Sequence[int]], shown: Sequence[Probe], device: torch.device
) -> dict[str, Tensor]:
    """What the forward takes of the media of some sequences, padded on the right; nothing where there are none."""
    opener = next((probe.opener for probe in shown if probe.media), None)
    if opener is None:
        return {}
    flat_1T = torch.tensor([[token for ids in sequences for token in ids]])
    found = opener([medium for probe in shown for medium in probe.media], flat_1T)
    bounds = torch.tensor([0, *accumulate(map(len, sequences))])
    return {name: values.to(device) for name, values in padded_media(found, bounds, "right").items()}


def padded_scores(model: PreTrainedModel, live: Answers, pad_id: int) -> list[float]:
    """The scores of a reward model for the sequences of `live`, all rows in one batch that is padded on the right, as
    others ask it."""
    sequences = live.sequences
    width = max(map(len, sequences))
    rows = torch.tensor([[*ids, *[pad_id] * (width - len(ids))] for ids in sequences], device=model.device)
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in sequences], device=model.device)
    with torch.no_grad():
        media = _opened(sequences, live.shown, model.device)
        return [float(score) for score in model(input_ids=rows, attention_mask=mask, **media).logits[:, 0]]


# --------------------------------------------------------------------------------------------------
# How far apart


@dataclass(frozen=True, slots=True)
class Distance:
    """Between two models: KL(first || second) per token in nats, the largest difference of two logits, the largest
    change of the margin between the first one's two best tokens, the largest difference of two scores; `scale` is the
    size of the largest logit or score."""

    kl_mean: float = 0.0
    kl_max: float = 0.0
    logit_max: float = 0.0
    margin_max: float = 0.0
    score_max: float = 0.0
    scale: float = 1.0


def distance(first: Answers, second: Answers) -> Distance:
    """Over all positions of all sequences; infinite where a number is not finite or the vocabularies differ."""
    infinite = float("inf")
    if first.scores:
        differences = [abs(a - b) for a, b in zip(first.scores, second.scores, strict=True)]
        worst = max(differences) if all(d == d for d in differences) else infinite
        return Distance(score_max=worst, scale=max(abs(score) for score in first.scores))
    divergences, largest, margin, scale = [], 0.0, 0.0, 0.0
    for a_KV, b_KV in zip(first.logits, second.logits, strict=True):
        if a_KV.shape != b_KV.shape or not bool(b_KV.isfinite().all()):
            return Distance(infinite, infinite, infinite, infinite, scale=float(a_KV.abs().max()))
        # In float64: the divergence of models that agree is below what float32 can tell from 0.
        a, b = a_KV.double().log_softmax(-1), b_KV.double().log_softmax(-1)
        divergences.append((a.exp() * (a - b)).nan_to_num().sum(-1))
        largest = max(largest, float((a_KV - b_KV).abs().max()))
        best_K2 = a_KV.topk(2).indices
        margins = [logits_KV.gather(1, best_K2).diff(dim=1) for logits_KV in (a_KV, b_KV)]
        margin = max(margin, float((margins[0] - margins[1]).abs().max()))
        scale = max(scale, float(a_KV.abs().max()))
    kl = torch.cat(divergences)
    return Distance(float(kl.mean()), float(kl.max()), largest, margin, scale=scale)


@dataclass(frozen=True, slots=True)
class GreedyDifference:
    """The first token at which two greedy answers part: the probe, the position, both tokens (None: the end), and by
    how much the first model prefers its own, in logits."""

    probe: int
    position: int
    token: int | None
    other: int | None
    margin: float


def greedy_differences(first: Answers, second: Answers, stop_ids: Sequence[int]) -> list[GreedyDifference]:
    """Where greedy answers differ; `first` has the logits of its own answers."""
    found = []
    path_logits = first.logits[len(first.greedy) :]
    for number, (mine, theirs) in enumerate(zip(first.greedy, second.greedy, strict=True)):
        if mine == theirs:
            continue
        at = next(
            (i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b),
            min(len(mine), len(theirs)),
        )
        logits_V = path_logits[number][len(path_logits[number]) - len(mine) - 1 + at]
        token = mine[at] if at < len(mine) else None
        other = theirs[at] if at < len(theirs) else None
        margin = _best(logits_V, token, stop_ids) - _best(logits_V, other, stop_ids)
        found.append(GreedyDifference(number, at, token, other, margin))
    return found


def _best(logits_V: Tensor, token: int | None, stop_ids: Sequence[int]) -> float:
    """The logit of a token; of the end of an answer that of the likeliest stop token."""
    return float(logits_V[list(stop_ids)].max()) if token is None else float(logits_V[token])
