"""Learning from answers that are each marked as desirable or not (Ethayarajh et al., 2024, arXiv:2402.01306)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from luthier.data.encode import EncodeOptions
from luthier.data.pairs import feedback_sample
from luthier.recipe.stage import KtoSpec
from luthier.stages.answers import answers_batch, num_rows, row_lengths, row_sums, token_rows
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


class Feedback:
    """KTO, equation 7 and 8 of the paper, and its likeness without a point of reference, APO-zero for single answers
    (D'Oosterlinck et al., 2024, arXiv:2408.06266).

    With u the log-ratio of an answer to the reference, a desirable row costs w (1 - sigmoid(beta (u - z))), another
    w (1 - sigmoid(beta (z - u))). z is the mean log-ratio of answers to other prompts over the whole step, without
    gradient and not below 0; apo_zero_unpaired has z = 0. The loss is a sum over rows. With `sft_weight` a second term
    is the mean negative log-likelihood per token of the desirable answers, divided by their number.
    """

    name = "kto"
    kind: RowKind = "feedback"
    model: ModelKind = "language"
    needs_reference = True
    is_likelihood = False
    share_prompts = False

    def __init__(self, spec: KtoSpec, options: EncodeOptions, *, share_prompts: bool = False) -> None:
        """`share_prompts` has nothing to share: the answers to one prompt are never computed together."""
        self.spec, self.options = spec, options
        self.encode = partial(feedback_sample, options=self.options)
        self.needs_mismatched = spec.loss == "kto"
        self.terms: tuple[str, ...] = ("preference", "sft") if spec.sft_weight else ("loss",)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        batch = answers_batch(samples, branches=[0])
        if self.needs_mismatched:
            batch.mismatched = answers_batch(samples, branches=[1])
        return batch

    def weight(self, batch: Batch) -> dict[str, Tensor]:
        labels = _labels(batch)
        weights = {self.terms[0]: torch.ones_like(labels).sum()}
        return weights | {"sft": labels.sum()} if self.spec.sft_weight else weights

    def observe(self, policy: Policy, passes: Sequence[Batch], *, alone: bool = True) -> Observed:
        """`mismatched` (rows of the step,): log-ratios of answers to other prompts."""
        if not self.needs_mismatched:
            return {}
        return {"mismatched": torch.cat([_mismatched_ratios(policy, batch) for batch in passes])}

    def loss(self, policy: Policy, batch: Batch, observed: Observed) -> LossSum:
        """Without what `observe` saw, the batch is taken to be a whole step."""
        divergence = self._divergence(policy, batch, observed)
        rows_N, rows = token_rows(batch), num_rows(batch)
        # The reference first: its activations are gone before the policy's are kept for the backward pass.
        reference_R = row_sums(policy.reference_logprobs(batch), rows_N, rows)
        desirable, signs = _labels(batch), 2 * _labels(batch) - 1
        logprobs_R = row_sums(policy.logprobs(batch).logprobs, rows_N, rows)
        ratios = logprobs_R - reference_R
        losses = (-signs * self.spec.beta * (ratios - divergence)).sigmoid()
        scale = torch.where(desirable > 0, self.spec.desirable_weight, self.spec.undesirable_weight)
        weights = self.weight(batch)
        terms = {self.terms[0]: Term((scale * losses).sum(), weights[self.terms[0]])}
        if self.spec.sft_weight:
            nll = (desirable * -logprobs_R / row_lengths(rows_N, rows).clamp(min=1)).sum()
            terms["sft"] = Term(self.spec.sft_weight * nll, weights["sft"])
        metrics = _by_label({"rewards": self.spec.beta * ratios, "logps": logprobs_R}, desirable)
        if self.needs_mismatched:
            num = torch.ones_like(desirable).sum()
            metrics["kl"] = Term(divergence * num, num)
        # Without the second term, whose weight is another.
        return LossSum(terms, metrics, by_sample=Term((scale * losses).detach(), torch.ones_like(desirable)))

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        """The margin, where there are answers of both kinds."""
        chosen, rejected = means.get("rewards/chosen"), means.get("rewards/rejected")
        return {} if chosen is None or rejected is None else {"rewards/margins": chosen - rejected}

    def _divergence(self, policy: Policy, batch: Batch, observed: Observed) -> Tensor:
        """z, a number; 0 where there is no row at all."""
        if not self.needs_mismatched:
            return torch.zeros((), device=batch.targets.device)
        with torch.no_grad():
            ratios = observed["mismatched"] if observed else _mismatched_ratios(policy, batch)
            return ratios.sum().div(max(len(ratios), 1)).clamp(min=0)


def _labels(batch: Batch) -> Tensor:
    """(R,) float32: 1 for a desirable row, else 0."""
    assert batch.labels is not None
    return (batch.labels > 0).float()


def _mismatched_ratios(policy: Policy, batch: Batch) -> Tensor:
    """(R,) log-ratios to the reference of answers to other prompts."""
    other = batch.mismatched
    assert other is not None
    log_ratios_N = policy.logprobs(other).logprobs.float() - policy.reference_logprobs(other).float()
    return row_sums(log_ratios_N, token_rows(other), num_rows(other))


def _by_label(values: dict[str, Tensor], desirable: Tensor) -> dict[str, Term]:
    """Sums over desirable rows as `<name>/chosen` and over the others as `<name>/rejected`, with their counts."""
    return {
        f"{name}/{half}": Term((mask * column.detach()).sum(), mask.sum())
        for name, column in values.items()
        for half, mask in (("chosen", desirable), ("rejected", 1 - desirable))
    }
