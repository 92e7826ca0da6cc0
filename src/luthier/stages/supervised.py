"""The losses of supervised targets: their weighted negative log-likelihood and what is made of it, as sums.

Knows nothing of optimizers, devices, accumulation or processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from luthier.types import IGNORE_INDEX, Batch, LossSum, Observed, Policy, Term


class Separable:
    """A stage whose loss is a sum over rows, so that no pass of a step needs to know of the others."""

    needs_mismatched = False
    share_prompts = False

    def observe(self, policy: Policy, passes: Sequence[Batch], *, alone: bool = True) -> Observed:
        return {}

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        return {}


def supervised_weights(batch: Batch) -> Tensor:
    """(N,) loss weights of the supervised positions, in the order of `Policy.logprobs`."""
    return batch.target_weights[batch.targets != IGNORE_INDEX]


def negative_log_likelihood(policy: Policy, batch: Batch, label_smoothing: float) -> LossSum:
    """sum_t w_t [(1 - e) (-log p_t) + e (-mean_v log p_v)] over the targets, with its weight sum_t w_t.

    e is the label smoothing of Szegedy et al. (2015, arXiv:1512.00567), its prior uniform over all tokens.
    With smoothing the metric `nll` keeps the plain likelihood, so that perplexity stays what it says.
    """
    answers = policy.logprobs(batch, mean_logprobs=label_smoothing > 0)
    weights_N = supervised_weights(batch)
    weight = weights_N.sum()
    nll = -(weights_N * answers.logprobs).sum()
    each_N = -weights_N * answers.logprobs.detach()
    if answers.mean_logprobs is None:
        return LossSum({"loss": Term(nll, weight)}, by_target=Term(each_N, weights_N))
    smoothed = -(weights_N * answers.mean_logprobs).sum()
    total = (1 - label_smoothing) * nll + label_smoothing * smoothed
    each_N = (1 - label_smoothing) * each_N - label_smoothing * weights_N * answers.mean_logprobs.detach()
    metrics = {"nll": Term(nll.detach(), weight)}
    return LossSum({"loss": Term(total, weight)}, metrics, by_target=Term(each_N, weights_N))


def reweighted_likelihood(batch: Batch, logprobs_N: Tensor, factors_N: Tensor) -> LossSum:
    """sum_t w_t f_t (-log p_t) over the targets, with the weight sum_t w_t: the factors do not divide.

    `factors_N` come without a graph. The metric `nll` is the plain likelihood, of which perplexity is.
    """
    weights_N = supervised_weights(batch)
    weight = weights_N.sum()
    total = -(weights_N * factors_N * logprobs_N).sum()
    nll = -(weights_N * logprobs_N.detach()).sum()
    each_N = -weights_N * factors_N * logprobs_N.detach()
    metrics = {"nll": Term(nll, weight)}
    return LossSum({"loss": Term(total, weight)}, metrics, by_target=Term(each_N, weights_N))
