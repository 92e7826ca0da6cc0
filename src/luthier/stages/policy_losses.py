"""Losses of tokens that a policy sampled, given what each was worth: nothing here knows of batches or stages.

Shapes: N tokens of all answers, R answers. Log-ratios are log (policy / policy before the update).
"""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.stages.answers import row_lengths, row_sums
from luthier.stages.divergence import FURTHEST


def answer_log_ratios(log_ratios_N: Tensor, rows_N: Tensor, rows: int, kind: str) -> Tensor:
    """(N,) the log-ratio whose exponential is clipped, for each token that of the recipe's `ratio`.

    token: its own. sequence: the mean over its answer, whose exponential is the geometric mean of the ratios (Zheng
    et al., 2025, arXiv:2507.18071, equation 7). product: the sum over its answer, the ratio of the answer as one
    action (Ahmadian et al., 2024, arXiv:2402.14740, section 2).
    """
    if kind == "token":
        return log_ratios_N
    sums_R = row_sums(log_ratios_N, rows_N, rows)
    if kind == "sequence":
        sums_R = sums_R / row_lengths(rows_N, rows).clamp(min=1)
    return sums_R[rows_N]


def ratios(log_ratios_N: Tensor) -> Tensor:
    """(N,) probability ratios; finite, however far apart the policies are."""
    return log_ratios_N.clamp(max=FURTHEST).exp()


def clipped_surrogate(ratios_N: Tensor, advantages_N: Tensor, low: float, high: float) -> Tensor:
    """(N,) -min(r A, clip(r, 1 - low, 1 + high) A) (Schulman et al., 2017, arXiv:1707.06347, equation 7; with two
    distances Yu et al., 2025, arXiv:2503.14476, equation 10)."""
    clipped_N = ratios_N.clamp(1 - low, 1 + high)
    return -torch.minimum(ratios_N * advantages_N, clipped_N * advantages_N)


def clipped_weight(logprobs_N: Tensor, ratios_N: Tensor, advantages_N: Tensor, high: float) -> Tensor:
    """(N,) -sg(min(r, 1 + high)) A log p: REINFORCE in which a token's weight is cut but none loses its gradient
    (CISPO: MiniMax, 2025, arXiv:2506.13585, equations 4 and 5, without the lower bound, as the authors run it)."""
    return -ratios_N.detach().clamp(max=1 + high) * advantages_N * logprobs_N


def value_loss(values_N: Tensor, before_N: Tensor, returns_N: Tensor, clip: float | None) -> Tensor:
    """(N,) (v - R)^2 / 2, or with `clip` the larger of that and the same with v within `clip` of what it was before
    the update (Schulman et al., 2017, in the authors' code; Engstrom et al., 2020, arXiv:2005.12729, section 3)."""
    errors_N = (values_N - returns_N).square()
    if clip is not None:
        near_N = torch.clamp(values_N, before_N - clip, before_N + clip)
        errors_N = torch.maximum(errors_N, (near_N - returns_N).square())
    return errors_N / 2


def truncated_importance(logprobs_N: Tensor, sampled_N: Tensor, cap: float) -> Tensor:
    """(N,) min(policy before the update / what was sampled from, cap), without a graph (Espeholt et al., 2018,
    arXiv:1802.01561; for engines that compute otherwise than training, Yao et al., 2025, "Your efficient RL framework
    secretly brings you off-policy RL training")."""
    return ratios((logprobs_N - sampled_N).detach()).clamp(max=cap)


def clipped_shares(ratios_N: Tensor, advantages_N: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """(N,) float32 each: 1 for tokens that earn no more because they left the range downwards, and upwards."""
    below_N = (ratios_N < 1 - low) & (advantages_N < 0)
    above_N = (ratios_N > 1 + high) & (advantages_N > 0)
    return below_N.float(), above_N.float()
