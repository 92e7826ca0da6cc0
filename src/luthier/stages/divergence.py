"""How far a policy is from another, from samples of its own, and how strongly it is held there.

Estimators of KL(policy || reference) from tokens that the policy sampled (Schulman, 2020,
http://joschu.net/blog/kl-approx.html), r = reference / policy: k1 = -log r is unbiased and may be negative,
k2 = (log r)^2 / 2 is biased and has the right gradient, k3 = r - 1 - log r is unbiased and never negative.
"""

from __future__ import annotations

import torch
from torch import Tensor

FURTHEST = 60.0
"""Largest logarithm that is exponentiated: e^60 is a float32, and nothing that is still learning gets there."""


def estimated(logprobs: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """The estimate of each token by name, k1, k2 or k3; differentiable."""
    apart = reference - logprobs
    if estimator == "k1":
        return -apart
    if estimator == "k2":
        return apart.square() / 2
    assert estimator == "k3", estimator
    return torch.expm1(apart.clamp(max=FURTHEST)) - apart


def adapted(coefficient: float, divergence: float, target: float, horizon: int, answers: float) -> float:
    """The coefficient after a rollout of so many answers whose mean divergence was `divergence`.

    c (1 + e n / horizon) with e = divergence / target - 1, cut at 0.2 both ways (Ziegler et al., 2019,
    arXiv:1909.08593, section 2.2).
    """
    error = min(max(divergence / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * answers / horizon)
