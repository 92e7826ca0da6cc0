"""Proximal policy optimisation (Schulman et al., 2017, arXiv:1707.06347) of answers (Ouyang et al., 2022,
arXiv:2203.02155).

The reward of a token is -kl.coefficient times its divergence from the reference; the answer's score is added at its
last token. A critic says what is expected from each token on, generalised advantage estimation what came out better.
With r = policy / policy before the update, w the truncated importance weight and v the critic's value,

    loss = mean of w (-min(r A, clip(r) A)) + value_weight mean of value loss - entropy mean of H      over tokens
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.data.encode import EncodeOptions
from luthier.experience import Rollout
from luthier.recipe.online import PpoSpec
from luthier.stages.advantages import (
    Moments,
    Total,
    alone,
    explained,
    generalised_advantages,
    normalised,
    whiten,
)
from luthier.stages.online import (
    OnlineLearning,
    Reported,
    num_targets,
    ratio_metrics,
    signal,
)
from luthier.stages.policy_losses import clipped_shares, clipped_surrogate, ratios, value_loss
from luthier.types import Batch, LossSum, Observed, Policy, Term


@dataclass(frozen=True, slots=True)
class _Estimates:
    """(N,) each: what a rollout says of its tokens. `moments` are those of all scores so far."""

    advantages: Tensor
    returns: Tensor
    scores: Tensor
    moments: Moments


class Proximal(OnlineLearning):
    """Tokens after which more was earned than the critic expected become likelier, the others less so."""

    name = "ppo"
    needs_values = True
    share_prompts = False

    def __init__(
        self,
        spec: PpoSpec,
        options: EncodeOptions,
        *,
        share_prompts: bool = False,
        temperature: float = 1.0,
        max_new_tokens: int | None = None,
    ) -> None:
        """`share_prompts` has nothing to share: each prompt has one answer."""
        super().__init__(spec, options, temperature=temperature, max_new_tokens=max_new_tokens)
        self.spec = spec
        self.terms: tuple[str, ...] = ("policy", "value", *(["entropy"] if spec.entropy else []))

    # ---- what is known of a rollout --------------------------------------------------------------------

    def signals(self, rollout: Rollout, total: Total) -> dict[str, Tensor]:
        signals = self._common_signals(rollout, total)
        estimates = self._estimates(rollout, total)
        if self.spec.score_norm:
            self._seen["scores"] = estimates.moments.state()
        advantages = estimates.advantages
        if self.spec.whiten_advantages:
            learnt = torch.from_numpy(self.learnt(rollout)).repeat_interleave(_lengths(rollout))
            advantages = whiten(advantages, total, mask=learnt)
        assert rollout.values is not None
        values = torch.from_numpy(rollout.values)
        return signals | {"advantages": advantages, "returns": estimates.returns, "values": values}

    def _estimates(self, rollout: Rollout, total: Total) -> _Estimates:
        """Scores -> rewards of tokens -> advantages and returns, before advantages are whitened."""
        assert rollout.values is not None
        scores_B, moments = self._scores(rollout, total)
        lengths_B = _lengths(rollout)
        rewards_N = torch.zeros(len(rollout.values))
        if self.needs_reference:
            rewards_N = -self.kl_coefficient * self._divergences(rollout)
        rewards_N = rewards_N.index_add(0, lengths_B.cumsum(0) - 1, scores_B)
        if self.spec.whiten_rewards:
            rewards_N = whiten(rewards_N, total, shift_mean=False)
        advantages, returns = generalised_advantages(
            rewards_N, torch.from_numpy(rollout.values), lengths_B, self.spec.discount, self.spec.trace
        )
        return _Estimates(advantages, returns, scores_B, moments)

    def _scores(self, rollout: Rollout, total: Total) -> tuple[Tensor, Moments]:
        """(B,) float32 what each answer earns: less the penalty, normalised, cut, in this order."""
        scores, moments = torch.from_numpy(rollout.totals).clone(), self._moments
        if self.spec.missing_end_penalty is not None:
            truncated = torch.tensor([completion.truncated for completion in rollout.completions])
            scores = scores - self.spec.missing_end_penalty * truncated.float()
        if self.spec.score_norm:
            moments = moments.merged(Moments.of(scores, total))
            scores = normalised(scores, moments)
        if self.spec.score_clip is not None:
            scores = scores.clamp(-self.spec.score_clip, self.spec.score_clip)
        return scores, moments

    def report(self, rollout: Rollout) -> Reported:
        """As `OnlineLearning.report`; besides, the scores that are learnt from, the critic before the update, and the
        advantages before they are whitened. Statistics are those of this process's answers."""
        estimates = self._estimates(rollout, alone)
        values, advantages = Moments.of(torch.from_numpy(rollout.values)), Moments.of(estimates.advantages)
        tokens = values.count
        return super().report(rollout) | {
            "score": (float(estimates.scores.double().sum()), float(len(rollout.completions))),
            "value/mean": (values.mean * tokens, tokens),
            "value/explained_variance": explained(estimates.returns, torch.from_numpy(rollout.values)),
            "return/mean": (float(estimates.returns.double().sum()), tokens),
            "advantage/std": (advantages.std * tokens, tokens),
        }

    # ---- the loss --------------------------------------------------------------------------------------

    def weight(self, batch: Batch) -> dict[str, Tensor]:
        return {name: num_targets(batch) for name in self.terms}

    def loss(self, policy: Policy, batch: Batch, observed: Observed) -> LossSum:
        answered, weights = self._answered(policy, batch), self.weight(batch)
        assert answered.values is not None
        advantages_N, low = signal(batch, "advantages"), self.spec.clip
        high = low if self.spec.clip_high is None else self.spec.clip_high
        ratios_N = ratios(answered.log_ratios)
        policy_N = clipped_surrogate(ratios_N, advantages_N, low, high) * self._importance(batch, answered)
        before_N, clip = signal(batch, "values"), self.spec.value_clip
        value_N = value_loss(answered.values.float(), before_N, signal(batch, "returns"), clip)
        terms = {
            "policy": Term(policy_N.sum(), weights["policy"]),
            "value": Term(self.spec.value_weight * value_N.sum(), weights["value"]),
        } | self._entropy_term(batch, answered)
        with torch.no_grad():
            clipped = clipped_shares(ratios_N, advantages_N, low, high)
            metrics = ratio_metrics(answered, ratios_N, advantages_N, clipped)
            if clip is not None:
                moved_N = (answered.values - before_N).abs() > clip
                metrics["value/clip_fraction"] = Term(moved_N.float().sum(), weights["value"])
        return LossSum(terms, metrics)


def _lengths(rollout: Rollout) -> Tensor:
    """(B,) int64."""
    return torch.from_numpy(rollout.lengths)
