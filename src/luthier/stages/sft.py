"""Supervised fine-tuning: the assistant's tokens are targets (Ouyang et al., 2022, arXiv:2203.02155).

Besides cross-entropy there are losses that weight each target by what the model says of it. All are sums over the
targets with their loss weights w_t, divided by sum_t w_t; p_t is the probability of target t, sg stops gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from luthier.data.collate import flat_batch
from luthier.data.encode import EncodeOptions, sft_sample
from luthier.recipe.schema import SftSpec
from luthier.stages.supervised import (
    Separable,
    negative_log_likelihood,
    reweighted_likelihood,
    supervised_weights,
)
from luthier.types import (
    Batch,
    LossSum,
    ModelKind,
    Observed,
    Policy,
    RowKind,
    Sample,
    Term,
)


class SupervisedFineTuning(Separable):
    """The weighted likelihood of the answers, given everything before them."""

    name = "sft"
    kind: RowKind = "conversation"
    model: ModelKind = "language"
    terms: tuple[str, ...] = ("loss",)
    is_likelihood = True

    def __init__(self, spec: SftSpec, options: EncodeOptions, *, share_prompts: bool = False) -> None:
        self.spec, self.options = spec, options
        self.encode = partial(sft_sample, options=self.options)
        self.needs_reference = spec.loss == "asft"

    def collate(self, samples: Sequence[Sample]) -> Batch:
        return flat_batch(samples)

    def weight(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": supervised_weights(batch).sum()}

    def loss(self, policy: Policy, batch: Batch, observed: Observed) -> LossSum:
        return LOSSES[self.spec.loss](policy, batch, self.spec)


def _cross_entropy(policy: Policy, batch: Batch, spec: SftSpec) -> LossSum:
    return negative_log_likelihood(policy, batch, spec.label_smoothing)


def _dft(policy: Policy, batch: Batch, spec: SftSpec) -> LossSum:
    """-sg(p_t) log p_t: dynamic fine-tuning (Wu et al., 2025, arXiv:2508.05629)."""
    logprobs_N = policy.logprobs(batch).logprobs
    return reweighted_likelihood(batch, logprobs_N, logprobs_N.detach().exp())


def _asft(policy: Policy, batch: Batch, spec: SftSpec) -> LossSum:
    """dft and `kl_weight` times KL(reference || policy) over the vocabulary at each target: anchored fine-tuning
    (Zhu et al., 2025, arXiv:2509.23753; the direction of the divergence is that of the authors' code)."""
    answers = policy.logprobs(batch, divergence=True)
    assert answers.divergence is not None
    loss = reweighted_likelihood(batch, answers.logprobs, answers.logprobs.detach().exp())
    likelihood = loss.terms["loss"]
    divergence = (supervised_weights(batch) * answers.divergence).sum()
    total = likelihood.total + spec.kl_weight * divergence
    loss.metrics["kl"] = Term(divergence.detach(), likelihood.weight)
    assert loss.by_target is not None
    weights_N = loss.by_target.weight
    each_N = loss.by_target.total + spec.kl_weight * weights_N * answers.divergence.detach()
    return LossSum({"loss": Term(total, likelihood.weight)}, loss.metrics, by_target=Term(each_N, weights_N))


def _eaft(policy: Policy, batch: Batch, spec: SftSpec) -> LossSum:
    """-(H_t / 3)^a log p_t: entropy-adaptive fine-tuning (Diao et al., 2026, arXiv:2601.02151).

    a is `entropy_power`; H_t, without gradient, is the entropy of the softmax over the 20 most likely tokens alone. 3
    stands for its largest value, log 20 = 2.996: so do the authors in LLaMA-Factory.
    """
    answers = policy.logprobs(batch, top_entropy=True)
    assert answers.top_entropy is not None
    return reweighted_likelihood(batch, answers.logprobs, (answers.top_entropy / 3).pow(spec.entropy_power))


LOSSES: dict[str, Callable[[Policy, Batch, SftSpec], LossSum]] = {
    "cross_entropy": _cross_entropy,
    "dft": _dft,
    "asft": _asft,
    "eaft": _eaft,
}
"""What `stage.loss` may name."""
