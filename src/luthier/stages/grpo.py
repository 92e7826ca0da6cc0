"""Group-relative policy optimisation (Shao et al., 2024, arXiv:2402.03300) and its relatives.

Every answer is judged beside the others to the same prompt, so no critic is needed. With r the ratio that the recipe
names, A the answer's advantage, w the truncated importance weight and k the divergence from the reference,

    loss = mean of w (-min(r A, clip(r) A)) + kl.coefficient mean of k - entropy mean of H

where `aggregation` says what the first two means are over.
"""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.data.encode import EncodeOptions
from luthier.experience import Rollout
from luthier.recipe.online import GrpoSpec
from luthier.stages.advantages import ADVANTAGES, Moments, Total, alone, equal_groups
from luthier.stages.divergence import estimated
from luthier.stages.online import (
    Answered,
    OnlineLearning,
    Reported,
    answer_means,
    num_answers,
    num_targets,
    ratio_metrics,
    signal,
)
from luthier.stages.policy_losses import (
    answer_log_ratios,
    clipped_shares,
    clipped_surrogate,
    clipped_weight,
    ratios,
)
from luthier.types import Batch, LossSum, Observed, Policy, RecipeError, Term


class GroupRelative(OnlineLearning):
    """Answers that are better than the others to their prompt become likelier, worse ones less so."""

    name = "grpo"

    def __init__(
        self,
        spec: GrpoSpec,
        options: EncodeOptions,
        *,
        share_prompts: bool = False,
        temperature: float = 1.0,
        max_new_tokens: int | None = None,
    ) -> None:
        """`max_new_tokens` is the longest that an answer may be, which `aggregation: constant` divides by."""
        super().__init__(spec, options, temperature=temperature, max_new_tokens=max_new_tokens)
        self.spec, self.share_prompts, self.group_size = spec, share_prompts, spec.group_size
        others = [name for name, weight in (("kl", spec.kl.coefficient), ("entropy", spec.entropy)) if weight]
        self.terms: tuple[str, ...] = ("policy", *others) if others else ("loss",)

    def signals(self, rollout: Rollout, total: Total) -> dict[str, Tensor]:
        signals = self._common_signals(rollout, total)
        if self.spec.updates == 1 and self.spec.importance_cap is None:
            # One update alone: the policy before it is the policy, and the ratio is 1 to the last bit.
            del signals["logprobs"]
        if self.needs_reference:
            assert rollout.reference is not None
            signals["reference"] = torch.from_numpy(rollout.reference)
        advantages_B = self._advantages(rollout, total)
        signals["advantages"] = advantages_B.repeat_interleave(torch.from_numpy(rollout.lengths))
        return signals

    def _advantages(self, rollout: Rollout, total: Total) -> Tensor:
        return ADVANTAGES[self.spec.advantage](torch.from_numpy(rollout.totals), rollout.group_size, total)

    def report(self, rollout: Rollout) -> Reported:
        """As `OnlineLearning.report`; besides, the share of groups without any difference, and of advantages their
        deviation over the answers."""
        totals = torch.from_numpy(rollout.totals)
        equal = equal_groups(totals, rollout.group_size)
        advantages = Moments.of(self._advantages(rollout, alone))
        return super().report(rollout) | {
            "group/zero_variance": (float(equal.sum()), float(len(equal))),
            "advantage/std": (advantages.std * advantages.count, advantages.count),
        }

    # ---- the loss --------------------------------------------------------------------------------------

    def weight(self, batch: Batch) -> dict[str, Tensor]:
        tokens, answers = num_targets(batch), num_answers(batch)
        if self.spec.aggregation == "token":
            policy = tokens
        elif self.spec.aggregation == "sequence":
            policy = answers
        else:
            policy = answers * self._longest()
        return {name: tokens if name == "entropy" else policy for name in self.terms}

    def _longest(self) -> int:
        if self.max_new_tokens is None:
            raise RecipeError(
                "stage.aggregation=constant divides by the longest that an answer may be; set generation.max_new_tokens"
            )
        return self.max_new_tokens

    def loss(self, policy: Policy, batch: Batch, observed: Observed) -> LossSum:
        answered, weights = self._answered(policy, batch), self.weight(batch)
        advantages_N = signal(batch, "advantages")
        ratios_N = ratios(
            answer_log_ratios(answered.log_ratios, answered.rows_N, answered.rows, self.spec.ratio)
        )
        policy_N = self._surrogate(answered, ratios_N, advantages_N) * self._importance(batch, answered)
        terms = {self.terms[0]: Term(self._added(policy_N, answered), weights[self.terms[0]])}
        if "kl" in weights:
            divergence_N = estimated(answered.logprobs, signal(batch, "reference"), self.spec.kl.estimator)
            if self.spec.kl_correction:
                divergence_N = divergence_N * ratios_N
            total = self.kl_coefficient * self._added(divergence_N, answered)
            terms["kl"] = Term(total, weights["kl"])
        terms |= self._entropy_term(batch, answered)
        return LossSum(terms, self._metrics(answered, ratios_N.detach(), advantages_N))

    def _surrogate(self, answered: Answered, ratios_N: Tensor, advantages_N: Tensor) -> Tensor:
        low, high = self._range
        if self.spec.loss == "cispo":
            return clipped_weight(answered.logprobs, ratios_N, advantages_N, high)
        return clipped_surrogate(ratios_N, advantages_N, low, high)

    @property
    def _range(self) -> tuple[float, float]:
        """How far a ratio may leave 1 downwards and upwards."""
        return self.spec.clip, self.spec.clip if self.spec.clip_high is None else self.spec.clip_high

    def _added(self, values_N: Tensor, answered: Answered) -> Tensor:
        """The sum that `weight` divides."""
        if self.spec.aggregation == "sequence":
            values_N = answer_means(values_N, answered)
        return values_N.sum()

    def _metrics(self, answered: Answered, ratios_N: Tensor, advantages_N: Tensor) -> dict[str, Term]:
        below_N, above_N = clipped_shares(ratios_N, advantages_N, *self._range)
        if self.spec.loss == "cispo":
            below_N = torch.zeros_like(below_N)  # nothing is cut downwards
        return ratio_metrics(answered, ratios_N, advantages_N, (below_N, above_N))
