"""What the stages have in common that learn from answers of their own: prompts, batches, statistics, the log.

Shapes are those of `experience`: B answers of a rollout, N their tokens; in a batch N are the tokens of its R answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from luthier.data.encode import EncodeOptions
from luthier.data.prompts import prompt_sample
from luthier.experience import Rollout
from luthier.recipe.online import GrpoSpec, PpoSpec, reward_names
from luthier.stages.advantages import Moments, Total
from luthier.stages.answers import answers_batch, num_rows, row_lengths, token_rows
from luthier.stages.divergence import adapted, estimated
from luthier.stages.policy_losses import truncated_importance
from luthier.stages.supervised import Separable
from luthier.types import (
    IGNORE_INDEX,
    Batch,
    ModelKind,
    Policy,
    RowKind,
    Sample,
    Term,
)

Reported = dict[str, tuple[float, float]]
"""Numbers for the log by name: sum and weight."""


@dataclass(frozen=True, slots=True)
class Answered:
    """What a policy says now of the answers of a batch, and which answer each token belongs to."""

    logprobs: Tensor
    before: Tensor
    """(N,) log-probabilities before the update; the own ones without a graph where it is the first and only one."""
    entropy: Tensor
    values: Tensor | None
    rows_N: Tensor
    rows: int

    @property
    def log_ratios(self) -> Tensor:
        return self.logprobs - self.before


class OnlineLearning(Separable):
    """The part of `experience.OnlineStage` that does not depend on how answers are judged.

    The KL coefficient and the moments of scores are the only things that change; they do so in `after`, from what
    `signals` saw last, which is the same on every process.
    """

    kind: RowKind = "prompt"
    model: ModelKind = "language"
    is_likelihood = False
    needs_values = False
    group_size = 1

    def __init__(
        self,
        spec: PpoSpec | GrpoSpec,
        options: EncodeOptions,
        *,
        temperature: float,
        max_new_tokens: int | None,
    ) -> None:
        self.options, self.temperature, self.max_new_tokens = options, temperature, max_new_tokens
        self.encode = partial(prompt_sample, options=self.options)
        self._spec: PpoSpec | GrpoSpec = spec
        self.needs_reference = spec.kl.coefficient > 0
        self.kl_coefficient = spec.kl.coefficient
        self._moments = Moments()
        self._seen: dict[str, Any] = {}

    # ---- rows and batches ------------------------------------------------------------------------------

    def collate(self, samples: Sequence[Sample]) -> Batch:
        return answers_batch(samples, share_prompts=self.share_prompts)

    # ---- what is known of a rollout --------------------------------------------------------------------

    def learnt(self, rollout: Rollout) -> np.ndarray[Any, np.dtype[np.bool_]]:
        if not self._spec.mask_truncated:
            return np.ones(len(rollout.completions), np.bool_)
        return np.array([not completion.truncated for completion in rollout.completions], np.bool_)

    def _common_signals(self, rollout: Rollout, total: Total) -> dict[str, Tensor]:
        """The signals that come as they are, and notes for `after`."""
        signals = {"logprobs": torch.from_numpy(rollout.logprobs)}
        if self._spec.importance_cap is not None:
            signals["sampled"] = torch.from_numpy(rollout.sampled)
        self._seen = {}
        if self.needs_reference and self._spec.kl.target is not None:
            sums = torch.tensor([float(self._divergences(rollout).sum()), len(rollout.completions)])
            divergence, answers = total(sums.double()).tolist()
            self._seen = {"kl": divergence / max(answers, 1.0), "answers": answers}
        return signals

    def _divergences(self, rollout: Rollout) -> Tensor:
        """(N,) estimates of the divergence from the reference at each token, before the update."""
        assert rollout.reference is not None
        policy, reference = torch.from_numpy(rollout.logprobs), torch.from_numpy(rollout.reference)
        return estimated(policy, reference, self._spec.kl.estimator)

    def after(self, rollout: Rollout, means: Mapping[str, float]) -> None:
        """Adapt the KL coefficient to the divergence of the rollout, and count its scores."""
        kl, seen = self._spec.kl, self._seen
        if kl.target is not None and "kl" in seen:
            self.kl_coefficient = adapted(
                self.kl_coefficient, seen["kl"], kl.target, kl.horizon, seen["answers"]
            )
        if "scores" in seen:
            self._moments = Moments.restored(seen["scores"])
        self._seen = {}

    def state(self) -> dict[str, Any]:
        return {
            "kl_coefficient": self.kl_coefficient,
            "scores": self._moments.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.kl_coefficient = float(state["kl_coefficient"])
        self._moments = Moments.restored(state["scores"])

    def report(self, rollout: Rollout) -> Reported:
        """Means over answers, and of a deviation or a maximum that of this process's answers.

        `reward` is the weighted sum, `reward/NAME` one function before its weight; lengths are in tokens;
        `completion/bad_scores` is there where scores were no numbers; `kl` is in
        nats per token and `kl/answer` per answer, which the target holds.
        """
        answers = len(rollout.completions)
        lengths = rollout.lengths
        numbers: Reported = {
            "reward": (float(rollout.totals.astype(np.float64).sum()), answers),
            "reward_std": (Moments.of(torch.from_numpy(rollout.totals)).std * answers, answers),
            "completion/length": (float(lengths.sum()), answers),
            "completion/length_max": (float(lengths.max(initial=0)), 1.0),
            "completion/truncated": (float(sum(c.truncated for c in rollout.completions)), answers),
        }
        for column, name in enumerate(reward_names(self._spec.rewards)):
            numbers[f"reward/{name}"] = (float(rollout.rewards[:, column].astype(np.float64).sum()), answers)
        if bad := sum(completion.bad_scores for completion in rollout.completions):
            numbers["completion/bad_scores"] = (float(bad), answers)
        if self.needs_reference:
            divergence = float(self._divergences(rollout).double().sum())
            numbers["kl"] = (divergence, float(lengths.sum()))
            numbers["kl/answer"] = (divergence, answers)
            numbers["kl/coefficient"] = (self.kl_coefficient, 1.0)
        return numbers

    # ---- the loss --------------------------------------------------------------------------------------

    def _answered(self, policy: Policy, batch: Batch) -> Answered:
        # For the log its number is enough; its gradient would be a second backward pass of the head.
        entropy: bool | Literal["value"] = True if self._spec.entropy else "value"
        answers = policy.logprobs(
            batch, entropy=entropy, values=self.needs_values, temperature=self.temperature
        )
        assert answers.entropy is not None
        logprobs_N = answers.logprobs.float()
        before_N = batch.signals.get("logprobs", logprobs_N.detach())
        rows_N, rows = token_rows(batch), num_rows(batch)
        if not rows:  # the one token of a process that has nothing to do
            before_N = logprobs_N.detach()
        return Answered(logprobs_N, before_N, answers.entropy.float(), answers.values, rows_N, rows)

    def _importance(self, batch: Batch, answered: Answered) -> Tensor | float:
        """(N,) weights for what the engine computed otherwise, where the recipe wants them."""
        cap = self._spec.importance_cap
        if cap is None or not answered.rows:
            return 1.0
        return truncated_importance(answered.before, batch.signals["sampled"], cap)

    def _entropy_term(self, batch: Batch, answered: Answered) -> dict[str, Term]:
        """The mean entropy of tokens, to be made larger."""
        if not self._spec.entropy:
            return {}
        return {"entropy": Term(-self._spec.entropy * answered.entropy.sum(), num_targets(batch))}


def signal(batch: Batch, name: str) -> Tensor:
    """(N,) what a rollout knows of the tokens of a batch; empty for a process that has nothing to do."""
    if num_rows(batch):
        return batch.signals[name]
    return torch.zeros(0, device=batch.targets.device)


def num_targets(batch: Batch) -> Tensor:
    """Tokens that are learnt, as a weight."""
    return (batch.targets != IGNORE_INDEX).sum().float()


def num_answers(batch: Batch) -> Tensor:
    return torch.tensor(num_rows(batch), dtype=torch.float32, device=batch.targets.device)


@torch.no_grad()
def ratio_metrics(
    answered: Answered, ratios_N: Tensor, advantages_N: Tensor, clipped: tuple[Tensor, Tensor]
) -> dict[str, Term]:
    """What the field logs of a policy's update, as sums over tokens.

    `approx_kl` is the divergence of the policy from what it was before the update, per token, by k3; `ratio/max` the
    mean over answers of the largest ratio of each; `clip_fraction` tokens that earn no more, below and above.
    """
    tokens = torch.tensor(float(len(ratios_N)), device=ratios_N.device)
    answers = torch.tensor(float(answered.rows), device=ratios_N.device)
    largest_R = torch.zeros(answered.rows, device=ratios_N.device)
    largest_R = largest_R.scatter_reduce(0, answered.rows_N, ratios_N, "amax")
    below_N, above_N = clipped
    # The samples are from the policy before the update: k3 of KL(before || now).
    divergence_N = estimated(answered.before, answered.logprobs, "k3")
    return {
        "entropy": Term(answered.entropy.sum(), tokens),
        "approx_kl": Term(divergence_N.sum(), tokens),
        "ratio/mean": Term(ratios_N.sum(), tokens),
        "ratio/max": Term(largest_R.sum(), answers),
        "clip_fraction": Term((below_N + above_N).sum(), tokens),
        "clip_fraction/low": Term(below_N.sum(), tokens),
        "clip_fraction/high": Term(above_N.sum(), tokens),
        "advantage/mean": Term(advantages_N.sum(), tokens),
    }


def answer_means(values_N: Tensor, answered: Answered) -> Tensor:
    """(N,) each token's number divided by the tokens of its answer, so that the sum is that of answers' means."""
    return values_N / row_lengths(answered.rows_N, answered.rows).clamp(min=1)[answered.rows_N]
