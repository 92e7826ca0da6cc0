"""The one numeric kernel: hidden states -> log-probabilities of the targets, in chunks, never N x V logits.

Knows nothing of models and of batches: it is given hidden states and a function that makes logits of them.

Shapes: N supervised positions, D hidden, V vocabulary, C rows of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Logits = Callable[[Tensor], Tensor]

LOGITS_PER_CHUNK = 2**23
"""Logits (C x V) that exist at one time: 32 MiB in float32; larger chunks were not faster on CPU."""
LOGITS_PER_CHUNK_CUDA = 2**27
TOP = 20
"""Largest logits that `top_entropy` is of."""


def chunk_rows(num_rows: int, vocab_size: int, device: torch.device) -> int:
    """Rows of a chunk, so that its logits stay within the limit of the device; at least 16."""
    limit = LOGITS_PER_CHUNK_CUDA if device.type == "cuda" else LOGITS_PER_CHUNK
    return max(16, min(num_rows, limit // vocab_size))


@dataclass(frozen=True, slots=True)
class Anchor:
    """A fixed distribution over the same vocabulary at the same targets: another model's, in place of its logits.

    hidden (N, D') are that model's hidden states; `logits_of` makes logits (C, V) of some of them, which are
    overwritten. It is called for one chunk at a time, during the forward pass and, where the trained head is called
    again in backward, then too.
    """

    hidden: Tensor
    logits_of: Logits

    def log_probabilities(self, start: int, stop: int, temperature: float) -> Tensor:
        """(C, V) float32 of the targets [start, stop), logits divided by `temperature`; without a graph."""
        with torch.no_grad():
            logits_CV = self.logits_of(self.hidden[start:stop]).float()
            if temperature != 1.0:
                logits_CV.div_(temperature)
            return logits_CV.sub_(logits_CV.logsumexp(dim=-1, keepdim=True))


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What is asked for besides the log-probabilities; `entropy_slope`: the entropy with its gradient."""

    entropy: bool
    entropy_slope: bool
    mean_logprobs: bool
    top_entropy: bool
    predictions: bool
    anchor: Anchor | None
    temperature: float

    @property
    def differentiable(self) -> tuple[str, ...]:
        """Names of the statistics that have gradients, in the order of `_statistics`."""
        flags = (
            ("entropy", self.entropy and self.entropy_slope),
            ("mean_logprobs", self.mean_logprobs),
        )
        names = ("logprobs", *(name for name, flag in flags if flag))
        return names if self.anchor is None else (*names, "divergence")

    @property
    def names(self) -> tuple[str, ...]:
        flags = (
            ("entropy", self.entropy and not self.entropy_slope),
            ("top_entropy", self.top_entropy),
            ("predictions", self.predictions),
        )
        return (*self.differentiable, *(name for name, flag in flags if flag))

    def anchored(self, start: int, stop: int) -> Tensor | None:
        return None if self.anchor is None else self.anchor.log_probabilities(start, stop, self.temperature)


def token_logprobs(
    hidden_ND: Tensor,
    logits_of: Logits,
    targets_N: Tensor,
    *,
    vocab_size: int,
    entropy: bool | Literal["value"],
    mean_logprobs: bool,
    head_trains: bool,
    predictions: bool = False,
    top_entropy: bool = False,
    anchor: Anchor | None = None,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """Log-probabilities of `targets_N` under p = softmax(`logits_of(hidden)` / t), each (N,) float32; differentiable.

    t is `temperature`, > 0; everything said here, the anchor's q too, is of logits divided by it, in float32.
    `entropy` is -sum p log p of each position, with "value" its number without a gradient;
    `mean_logprobs` is the mean log-probability of the vocabulary; with an anchor, whose distribution is q, `divergence`
    is KL(q || p) = sum q (log q - log p).
    Without a gradient: `top_entropy` is the entropy of the softmax over the `TOP` largest logits alone (all of a
    smaller vocabulary); `predictions` is the most likely token, (N,) int64.
    Where the head does not train, each row's gradient with respect to its own hidden state is computed
    together with its value, because a log-probability depends on no other row: the logits are then computed
    once. Where the head trains, every chunk is checkpointed and its logits are computed again in backward.
    """
    slope = entropy != "value"
    wanted = _Wanted(bool(entropy), slope, mean_logprobs, top_entropy, predictions, anchor, temperature)
    kinds = 1 if anchor is None else 2  # of logits that exist at one time
    rows = chunk_rows(len(targets_N), kinds * vocab_size, hidden_ND.device)
    bounds = [(start, min(start + rows, len(targets_N))) for start in range(0, len(targets_N), rows)]
    if torch.is_grad_enabled() and hidden_ND.requires_grad and not head_trains:
        arguments = (hidden_ND, targets_N, logits_of, bounds, wanted)
        outputs = _RowwiseLogprobs.apply(*arguments)  # type: ignore[no-untyped-call]
        assert isinstance(outputs, tuple)
    else:
        chunks = [_chunk(hidden_ND, targets_N, logits_of, *bound, wanted) for bound in bounds]
        outputs = tuple(torch.cat(column) for column in zip(*chunks, strict=True))
    return dict(zip(wanted.names, outputs, strict=True))


def _chunk(
    hidden_ND: Tensor, targets_N: Tensor, logits_of: Logits, start: int, stop: int, wanted: _Wanted
) -> tuple[Tensor, ...]:
    def run(hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        # The anchor first: what it does to the model for a moment is over before the trained head is called.
        anchored_CV = wanted.anchored(start, stop)
        logits_CV = logits_of(hidden).float()
        if wanted.temperature != 1.0:
            logits_CV = logits_CV / wanted.temperature
        return _statistics(logits_CV, targets, wanted, anchored_CV)

    if not torch.is_grad_enabled():
        return run(hidden_ND[start:stop], targets_N[start:stop])
    return tuple(checkpoint(run, hidden_ND[start:stop], targets_N[start:stop], use_reentrant=False))


def _statistics(
    logits_CV: Tensor, targets_C: Tensor, wanted: _Wanted, anchored_CV: Tensor | None
) -> tuple[Tensor, ...]:
    """Everything that is wanted of each row, in the order of `wanted.names`."""
    normaliser_C = logits_CV.logsumexp(dim=-1)
    outputs = [logits_CV.gather(-1, targets_C[:, None])[:, 0] - normaliser_C]
    if wanted.entropy and wanted.entropy_slope:
        outputs.append(_entropy(logits_CV, normaliser_C))
    if wanted.mean_logprobs:
        outputs.append(logits_CV.mean(dim=-1) - normaliser_C)
    if anchored_CV is not None:
        # Differences first: sum q log q - sum q log p would lose a small divergence in rounding.
        differences = anchored_CV - (logits_CV - normaliser_C[:, None])
        outputs.append((anchored_CV.exp() * differences).sum(-1))
    if wanted.entropy and not wanted.entropy_slope:
        outputs.append(_entropy(logits_CV.detach(), normaliser_C.detach()))
    if wanted.top_entropy:
        outputs.append(_top_entropy(logits_CV.detach()))
    if wanted.predictions:
        outputs.append(logits_CV.argmax(dim=-1))
    return tuple(outputs)


def _entropy(logits_CV: Tensor, normaliser_C: Tensor) -> Tensor:
    """(C,) H = log Z - sum p z."""
    probabilities = (logits_CV - normaliser_C[:, None]).exp()
    return normaliser_C - (probabilities * logits_CV).sum(-1)


def _top_entropy(logits_CV: Tensor) -> Tensor:
    """(C,) >= 0: rounding may not make it negative, since fractional powers are taken of it."""
    top_CK = logits_CV.topk(min(TOP, logits_CV.shape[-1]), dim=-1).values.log_softmax(-1)
    return -(top_CK.exp() * top_CK).sum(-1).clamp(max=0)


class _RowwiseLogprobs(torch.autograd.Function):
    """Values and per-row gradients in one pass over the chunks, for a head that does not train."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        targets_N: Tensor,
        logits_of: Logits,
        bounds: list[tuple[int, int]],
        wanted: _Wanted,
    ) -> tuple[Tensor, ...]:
        values: list[tuple[Tensor, ...]] = []
        gradients = [torch.empty_like(hidden_ND) for _ in wanted.differentiable]
        for start, stop in bounds:
            targets = targets_N[start:stop]
            anchored = wanted.anchored(start, stop)
            with torch.enable_grad():
                leaf = hidden_ND[start:stop].detach().requires_grad_()
                raw = logits_of(leaf)
            logits = raw.detach().float()
            if wanted.temperature != 1.0:  # in place: no backward pass of a head looks at its own output
                logits.div_(wanted.temperature)
            values.append(_statistics(logits, targets, wanted, anchored))
            slopes = _slopes(logits, targets, values[-1], wanted, anchored)
            del anchored
            for index, slope in enumerate(slopes):
                last = index == len(gradients) - 1
                if wanted.temperature != 1.0:
                    slope.div_(wanted.temperature)  # of logits that were not divided yet
                (grad,) = torch.autograd.grad(raw, leaf, slope.to(raw.dtype), retain_graph=not last)
                gradients[index][start:stop] = grad
                del slope, grad
        ctx.save_for_backward(*gradients)
        outputs = tuple(torch.cat(column) for column in zip(*values, strict=True))
        ctx.mark_non_differentiable(*outputs[len(gradients) :])
        return outputs

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        total: Tensor | None = None
        for up_N, gradient_ND in zip(upstream, ctx.saved_tensors, strict=False):  # the rest has no gradient
            part = gradient_ND * up_N[:, None].to(gradient_ND.dtype)
            total = part if total is None else total.add_(part)
        return total, None, None, None, None


def _slopes(
    logits_CV: Tensor,
    targets_C: Tensor,
    values: tuple[Tensor, ...],
    wanted: _Wanted,
    anchored_CV: Tensor | None,
) -> list[Tensor]:
    """d output / d logits (C, V) of each of `wanted.differentiable`; overwrites the logits and the anchor."""
    normaliser_C = logits_CV.gather(-1, targets_C[:, None])[:, 0] - values[0]
    probabilities = logits_CV.sub_(normaliser_C[:, None])
    slopes: list[Tensor] = []
    if wanted.entropy and wanted.entropy_slope:
        # dH/dz_v = -p_v (log p_v + H)
        slopes.append(-probabilities.exp() * (probabilities + values[1][:, None]))
    probabilities = probabilities.exp_()
    if wanted.mean_logprobs:
        slopes.append(1.0 / probabilities.shape[-1] - probabilities)
    if anchored_CV is not None:
        # dKL/dz_v = p_v - q_v
        slopes.append(anchored_CV.exp_().neg_().add_(probabilities))
    of_target = probabilities.neg_()
    of_target[torch.arange(len(targets_C), device=targets_C.device), targets_C] += 1.0
    return [of_target, *slopes]
