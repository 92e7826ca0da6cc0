"""Preference learning from pairs of answers: DPO (Rafailov et al., 2023, arXiv:2305.18290) and its family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from luthier.data.encode import EncodeOptions
from luthier.data.pairs import pair_sample
from luthier.recipe.stage import REFERENCE_FREE, DpoSpec
from luthier.stages.answers import (
    answers_batch,
    num_rows,
    pair_weights,
    row_keys,
    row_lengths,
    row_sums,
    token_rows,
)
from luthier.stages.pair_losses import LOSSES, Answers, Pairs, Step, log_odds_ratio, needs_step
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


class PreferencePairs:
    """The better answer should become likelier than the worse one, by the recipe's loss or weighted sum of losses.

    The loss is a sum over pairs. With `sft_weight` a second term is the mean negative log-likelihood per token of the
    better answers, also divided by the number of pairs.
    """

    name = "dpo"
    kind: RowKind = "pair"
    model: ModelKind = "language"
    needs_mismatched = False
    is_likelihood = False

    def __init__(self, spec: DpoSpec, options: EncodeOptions, *, share_prompts: bool = False) -> None:
        self.spec, self.options, self.share_prompts = spec, options, share_prompts
        self.encode = partial(pair_sample, options=self.options)
        self.needs_reference = not set(spec.losses) <= set(REFERENCE_FREE)
        self.terms: tuple[str, ...] = ("preference", "sft") if spec.sft_weight else ("loss",)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        return answers_batch(samples, share_prompts=self.share_prompts)

    def weight(self, batch: Batch) -> dict[str, Tensor]:
        return {term: _num_pairs(batch) for term in self.terms}

    def observe(self, policy: Policy, passes: Sequence[Batch], *, alone: bool = True) -> Observed:
        """`pair_losses.Step` of all pairs, where a loss depends on them; one pass alone knows them itself."""
        if (alone and len(passes) < 2) or not needs_step(self.spec):
            return {}
        steps = [Step.of(self._pairs(policy, batch)).tensors() for batch in passes]
        return {name: torch.cat([step[name] for step in steps]) for name in steps[0]}

    def loss(self, policy: Policy, batch: Batch, observed: Observed) -> LossSum:
        pairs = self._pairs(policy, batch)
        step = Step(**observed) if observed else Step.of(pairs)
        losses = {name: LOSSES[name](pairs, step, self.spec) for name in self.spec.losses}
        by_name = {name: values.sum() for name, values in losses.items()}
        total = torch.stack([weight * by_name[name] for name, weight in self.spec.losses.items()]).sum()
        weights = self.weight(batch)
        terms = {self.terms[0]: Term(total, weights[self.terms[0]])}
        if self.spec.sft_weight:
            terms["sft"] = Term(self.spec.sft_weight * pairs.chosen.nll.sum(), weights["sft"])
        with torch.no_grad():
            metrics = self._metrics(pairs)
            each = torch.stack([self.spec.losses[name] * values for name, values in losses.items()]).sum(0)
            if self.spec.sft_weight:
                each = each + self.spec.sft_weight * pairs.chosen.nll
        if len(by_name) > 1:
            metrics |= {f"loss/{name}": value.detach() for name, value in by_name.items()}
        return LossSum(
            terms,
            {name: Term(total, _num_pairs(batch)) for name, total in metrics.items()},
            by_sample=Term(each, torch.ones_like(each)),
        )

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        return {}

    def _pairs(self, policy: Policy, batch: Batch) -> Pairs:
        # The reference first: its activations are gone before the policy's are kept for the backward pass.
        reference_N = policy.reference_logprobs(batch).float() if self.needs_reference else None
        logprobs_N = policy.logprobs(batch).logprobs.float()
        rows_N, rows = token_rows(batch), num_rows(batch)
        lengths_R = row_lengths(rows_N, rows).float()
        nll_R = -row_sums(logprobs_N, rows_N, rows) / lengths_R.clamp(min=1)
        if self.spec.ld_alpha is not None:
            weights_N = pair_weights(batch, rows_N, self.spec.ld_alpha)
            logprobs_N = weights_N * logprobs_N
            reference_N = None if reference_N is None else weights_N * reference_N
        sums_R = row_sums(logprobs_N, rows_N, rows)
        reference_R = torch.zeros_like(sums_R) if reference_N is None else row_sums(reference_N, rows_N, rows)
        halves = zip(*(column.chunk(2) for column in (sums_R, reference_R, lengths_R, nll_R)), strict=True)
        chosen, rejected = (Answers(*half) for half in halves)
        assert batch.rows is not None
        return Pairs(chosen, rejected, row_keys(batch, batch.rows.chunk(2)[0]))

    def _metrics(self, pairs: Pairs) -> dict[str, Tensor]:
        """Sums over the pairs, of what the field logs under these names."""
        chosen, rejected = (self._reward(answers) for answers in (pairs.chosen, pairs.rejected))
        sums = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "rewards/margins": chosen - rejected,
            "logps/chosen": -pairs.chosen.nll * pairs.chosen.lengths,
            "logps/rejected": -pairs.rejected.nll * pairs.rejected.lengths,
        }
        if self.spec.sft_weight or not {"orpo", "cpo"}.isdisjoint(self.spec.losses):
            sums["nll_loss"] = pairs.chosen.nll
        if "orpo" in self.spec.losses:
            sums["log_odds_ratio"] = log_odds_ratio(pairs)
        return {name: values.sum() for name, values in sums.items()}

    def _reward(self, answers: Answers) -> Tensor:
        """beta times the log-ratio to the reference; without one, the log-probability that the loss compares."""
        if self.needs_reference or "cpo" in self.spec.losses:
            return self.spec.beta * answers.log_ratio
        return self.spec.beta * answers.mean_logprob


def _num_pairs(batch: Batch) -> Tensor:
    return torch.tensor(num_rows(batch) // 2, dtype=torch.float32, device=batch.targets.device)
