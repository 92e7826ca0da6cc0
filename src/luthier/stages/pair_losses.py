"""Losses of pairs of answers: pure functions of a few numbers per pair.

Each gives the (n,) float32 losses of n pairs, to be summed; `LOSSES` has them by name. With the log-ratio
u = log p(answer) - log p_ref(answer), a reward is beta u. The signs c and r mean the chosen and the rejected answer.

Some losses depend on all pairs of an optimizer step: on mean rewards, or on their order. Those numbers are in `Step`,
without gradients, so that the loss of a step is the sum over its passes, however it is cut.

Shapes: n pairs of a pass, P pairs of the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from luthier.recipe.stage import DpoSpec, PairLossName

MAX_EXPONENT = 80.0
"""exp() of more than this is not taken: float32 ends at exp(88.7)."""
LEAST_SURPRISE = torch.finfo(torch.float32).eps
"""A mean log-probability is taken to be at most minus this: the odds of a certain answer are infinite."""


@dataclass(frozen=True, slots=True)
class Answers:
    """One answer of each of n pairs; all (n,) float32."""

    logprobs: Tensor
    """Log-probabilities by the policy, summed over tokens."""
    reference: Tensor
    """The same by the reference; zeros where there is none."""
    lengths: Tensor
    """Number of tokens."""
    nll: Tensor
    """Mean negative log-likelihood per token; unlike `logprobs` never length-desensitised."""

    @property
    def log_ratio(self) -> Tensor:
        return self.logprobs - self.reference

    @property
    def mean_logprob(self) -> Tensor:
        return self.logprobs / self.lengths.clamp(min=1)


@dataclass(frozen=True, slots=True)
class Pairs:
    """n pairs; `keys` (n,) int64 say which pair of the step each is."""

    chosen: Answers
    rejected: Answers
    keys: Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """What the losses of a pass need to know of all P pairs of its step; without gradients, each (P,)."""

    keys: Tensor
    chosen: Tensor
    """Log-probabilities of the chosen answers by the policy."""
    rejected: Tensor
    chosen_reference: Tensor
    rejected_reference: Tensor

    @classmethod
    def of(cls, pairs: Pairs) -> Step:
        """The step that consists of these pairs alone."""
        return cls(
            keys=pairs.keys,
            chosen=pairs.chosen.logprobs.detach(),
            rejected=pairs.rejected.logprobs.detach(),
            chosen_reference=pairs.chosen.reference.detach(),
            rejected_reference=pairs.rejected.reference.detach(),
        )

    @property
    def chosen_ratio(self) -> Tensor:
        return self.chosen - self.chosen_reference

    @property
    def rejected_ratio(self) -> Tensor:
        return self.rejected - self.rejected_reference

    def tensors(self) -> dict[str, Tensor]:
        """By name, for `Stage.observe`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


Loss = Callable[[Pairs, Step, DpoSpec], Tensor]


def smoothed(margins: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigmoid(m) - e log sigmoid(-m): the order of a pair is taken to be wrong with probability e."""
    loss = -logsigmoid(margins)
    if not label_smoothing:
        return loss
    return (1 - label_smoothing) * loss - label_smoothing * logsigmoid(-margins)


def score(log_ratio: Tensor, spec: DpoSpec) -> Tensor:
    """f'(t) of t = p / p_ref, the reward of f-DPO (Wang et al., 2023, arXiv:2309.16240, table 1), up to a constant.

    reverse_kl log t; forward_kl 1 - 1/t; js log(2t / (1 + t)); alpha (1 - t^-a) / a, which is the first for a = 0 and
    the second for a = 1.
    """
    if spec.divergence == "js":
        return math.log(2) + logsigmoid(log_ratio)
    alpha = {"reverse_kl": 0.0, "forward_kl": 1.0}.get(spec.divergence, spec.divergence_alpha)
    if not alpha:
        return log_ratio
    return -torch.expm1((-alpha * log_ratio).clamp(max=MAX_EXPONENT)) / alpha


def _margin(pairs: Pairs, spec: DpoSpec) -> Tensor:
    """beta times the difference of scores."""
    return spec.beta * (score(pairs.chosen.log_ratio, spec) - score(pairs.rejected.log_ratio, spec))


def _mean_score_difference(pairs: Pairs, spec: DpoSpec) -> Tensor:
    chosen, rejected = (
        score(answers.log_ratio, spec) / answers.lengths.clamp(min=1)
        for answers in (pairs.chosen, pairs.rejected)
    )
    return chosen - rejected


def _rewards(pairs: Pairs, spec: DpoSpec) -> tuple[Tensor, Tensor]:
    return spec.beta * pairs.chosen.log_ratio, spec.beta * pairs.rejected.log_ratio


def sigmoid(pairs: Pairs, step: Step, spec: DpoSpec) -> Tensor:
    """DPO, Rafailov et al. (2023, arXiv:2305.18290), equation 7; with label smoothing the conservative DPO of Mitchell
    (2023)."""
    return smoothed(_margin(pairs, spec), spec.label_smoothing)


def robust(pairs: Pairs, step: Step, spec: DpoSpec) -> Tensor:
    """Robust DPO, Chowdhury et al. (2024, arXiv:2403.00409): an unbiased estimate of `sigmoid`'s loss on clean labels
    where a share e of them is flipped."""
    margin, noise = _margin(pairs, spec), spec.label_smoothing
    return ((1 - noise) * -logsigmoid(margin) + noise * logsigmoid(-margin)) / (1 - 2 * noise)


def hinge(pairs: Pairs, step: Step, spec: DpoSpec) -> Tensor:
    """SLiC's hinge, Zhao et al. (2023, arXiv:2305.10425), on DPO's margin as in Liu et al. (2023, arXiv:2309.06657)."""
    return relu(1 - _margin(pairs, spec))


def ipo(pairs: Pairs, step: Step, spec: DpoSpec) -> Tensor:
    """IPO, Azar et al. (2023, arXiv:2310.12036), equation 17; beta is the paper's tau.

    Scores are means per token. Sums would make the squared error grow with the answers' length; TRL averages too, and
    says that the paper's authors did in what they report.
    """
    return (_mean_score_difference(pairs, spec) - 1 / (2 * spec.beta)).square()


def sigmoid_norm(pairs: Pairs, step: Step, spec: DpoSpec) -> Tensor:
    """Length-normalised DPO, Lambert et al. (2024, arXiv:2411.15124), equation 6: `sigmoid` of means per token."""
    return -logsigmoid(spec.beta * _mean_score_difference(pairs, spec))


def exo_pair(pairs: Pairs, step: Step, spec: DpoSpec) -> Tensor:
    """EXO for two answers, Ji et al. (2024, arXiv:2402.00856), equation 16: KL(policy || labels), where the labels are
    (1 - e, e)."""
    margin, noise = _margin(pairs, spec), spec.label_smoothing
    won = margin.sigmoid() * (logsigmoid(margin) - math.log1p(-noise))
    return won + (-margin).sigmoid() * (logsigmoid(-margin) - math.log(noise))


def discopop(pairs: Pairs, step: Step, spec: DpoSpec) -> Tensor:
    """DiscoPOP, Lu et al. (2024, arXiv:2406.08414), equation 5: a logistic and an exponential loss, blended by the
    margin."""
    margin = _margin(pairs, spec)
    modulation = margin / spec.discopop_tau
    # exp(-margin) alone overflows for answers in the wrong order, where its share is next to nothing.
    exponential = (logsigmoid(modulation) - margin).clamp(max=MAX_EXPONENT).exp()
    return -logsigmoid(margin) * (-modulation).sigmoid() + exponential


def nca_pair(pairs: Pairs, step: Step, spec: DpoSpec) -> Tensor:
    """NCA for pairs, Chen et al. (2024, arXiv:2402.05369)."""
    chosen, rejected = _rewards(pairs, spec)
    return -logsigmoid(chosen) - 0.5 * (logsigmoid(-chosen) + logsigmoid(-rejected))


def sppo_hard(pairs: Pairs, step: Step, spec: DpoSpec) -> Tensor:
    """SPPO, Wu et al. (2024, arXiv:2405.00675), equation 4.7, the better answer winning with probability 1."""
    goal = 0.5 / spec.beta
    return (pairs.chosen.log_ratio - goal).square() + (pairs.rejected.log_ratio + goal).square()


def apo_zero(pairs: Pairs, step: Step, spec: DpoSpec) -> Tensor:
    """APO-zero, D'Oosterlinck et al. (2024, arXiv:2408.06266), equation 7: better answers up, worse ones down."""
    chosen, rejected = _rewards(pairs, spec)
    return (-chosen).sigmoid() + rejected.sigmoid()


def apo_down(pairs: Pairs, step: Step, spec: DpoSpec) -> Tensor:
    """APO-down, D'Oosterlinck et al. (2024, arXiv:2408.06266), equation 8: both down, worse ones more."""
    chosen, rejected = _rewards(pairs, spec)
    return chosen.sigmoid() + (rejected - chosen).sigmoid()


def kto_pair(pairs: Pairs, step: Step, spec: DpoSpec) -> Tensor:
    """KTO on pairs, Ethayarajh et al. (2024, arXiv:2402.01306): the mean over both answers of each pair.

    The point of reference of one half is the mean log-ratio of the other half over the step, not below 0.
    """
    divergence_chosen, divergence_rejected = (
        (ratio.mean() if len(ratio) else ratio.sum()).clamp(min=0)
        for ratio in (step.chosen_ratio, step.rejected_ratio)
    )
    gained = (spec.beta * (divergence_rejected - pairs.chosen.log_ratio)).sigmoid()
    lost = (spec.beta * (pairs.rejected.log_ratio - divergence_chosen)).sigmoid()
    return 0.5 * (gained + lost)


def bco_pair(pairs: Pairs, step: Step, spec: DpoSpec) -> Tensor:
    """BCO, Jung et al. (2024, arXiv:2404.04656), on both answers of each pair.

    With `bco_shift: step` the mean reward of all answers of the step, without gradient, is taken off every reward; with
    `none` nothing is.
    """
    chosen, rejected = _rewards(pairs, spec)
    if spec.bco_shift == "step" and len(step.keys):
        shift = spec.beta * 0.5 * (step.chosen_ratio.mean() + step.rejected_ratio.mean())
        chosen, rejected = chosen - shift, rejected - shift
    return -logsigmoid(chosen) - logsigmoid(-rejected)


def aot(pairs: Pairs, step: Step, spec: DpoSpec) -> Tensor:
    """Paired AOT, Melnyk et al. (2024, arXiv:2406.05882): over the step the policy's log-ratios between the answers,
    sorted, should exceed the reference's, sorted."""
    policy = pairs.chosen.logprobs - pairs.rejected.logprobs
    partners, shares = _partners(
        pairs, step, step.chosen - step.rejected, step.chosen_reference - step.rejected_reference
    )
    return (shares * smoothed(spec.beta * (policy[:, None] - partners), spec.label_smoothing)).sum(1)


def aot_unpaired(pairs: Pairs, step: Step, spec: DpoSpec) -> Tensor:
    """Unpaired AOT, Melnyk et al. (2024, arXiv:2406.05882): over the step the log-ratios of chosen answers to the
    reference, sorted, should exceed those of rejected ones, sorted.

    A comparison belongs to its chosen answer and is counted there; its rejected answer is in another pair, often of
    another pass, and adds its gradient with a value of zero.
    """
    beta, noise = spec.beta, spec.label_smoothing
    below, shares = _partners(pairs, step, step.chosen_ratio, step.rejected_ratio)
    of_chosen = smoothed(beta * (pairs.chosen.log_ratio[:, None] - below), noise)
    above, shares_above = _partners(pairs, step, step.rejected_ratio, step.chosen_ratio)
    of_rejected = smoothed(beta * (above - pairs.rejected.log_ratio[:, None]), noise)
    gradient_alone = of_rejected - of_rejected.detach()
    return (shares * of_chosen).sum(1) + (shares_above * gradient_alone).sum(1)


def _partners(pairs: Pairs, step: Step, own_P: Tensor, other_P: Tensor) -> tuple[Tensor, Tensor]:
    """For each pair the `other_P` value of the rank that its own has among `own_P`: values (1, P), shares (n, P).

    A pair finds itself by its key, not by its live value, which dropout or rounding may move past others. Pairs with
    equal values, and copies of one, have a range of ranks and an equal share in each: whatever their order, the step's
    loss and gradients are the same.
    """
    _, group_P = torch.unique(step.keys, return_inverse=True)
    lowest = torch.full_like(own_P, math.inf).scatter_reduce(0, group_P, own_P, "amin")
    own_P = lowest[group_P]
    found_n = (pairs.keys[:, None] == step.keys).int().argmax(1) if len(step.keys) else pairs.keys
    own_n, ranked_P = own_P[found_n], own_P.sort().values
    first_n = torch.searchsorted(ranked_P, own_n)[:, None]
    last_n = torch.searchsorted(ranked_P, own_n, right=True)[:, None]
    rank_P = torch.arange(len(ranked_P), device=ranked_P.device)
    within = (rank_P >= first_n) & (rank_P < last_n)
    return other_P.sort().values[None], within / (last_n - first_n)


def log_odds_ratio(pairs: Pairs) -> Tensor:
    """(n,) log odds(c) - log odds(r) of the mean log-probabilities, odds(p) = p / (1 - p): equation 4 of ORPO."""
    chosen, rejected = (
        answers.mean_logprob.clamp(max=-LEAST_SURPRISE) for answers in (pairs.chosen, pairs.rejected)
    )
    return (chosen - log1mexp(chosen)) - (rejected - log1mexp(rejected))


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, without cancellation (Mächler, 2012)."""
    return torch.where(x > -math.log(2), (-torch.expm1(x)).log(), torch.log1p(-x.exp()))


def orpo(pairs: Pairs, step: Step, spec: DpoSpec) -> Tensor:
    """ORPO, Hong et al. (2024, arXiv:2403.07691), equations 6 and 7; beta is the paper's lambda."""
    return pairs.chosen.nll - spec.beta * logsigmoid(log_odds_ratio(pairs))


def simpo(pairs: Pairs, step: Step, spec: DpoSpec) -> Tensor:
    """SimPO, Meng et al. (2024, arXiv:2405.14734), equation 6: rewards are beta times the mean log-probability, and
    should differ by gamma."""
    margin = spec.beta * (pairs.chosen.mean_logprob - pairs.rejected.mean_logprob) - spec.gamma
    return smoothed(margin, spec.label_smoothing)


def cpo(pairs: Pairs, step: Step, spec: DpoSpec) -> Tensor:
    """CPO, Xu et al. (2024, arXiv:2401.08417), equation 3 and the likelihood of the chosen answer, here per token."""
    margin = spec.beta * (pairs.chosen.logprobs - pairs.rejected.logprobs)
    return smoothed(margin, spec.label_smoothing) + pairs.chosen.nll


LOSSES: dict[PairLossName, Loss] = {
    "sigmoid": sigmoid,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
    "kto_pair": kto_pair,
    "bco_pair": bco_pair,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "sppo_hard": sppo_hard,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "sigmoid_norm": sigmoid_norm,
    "orpo": orpo,
    "simpo": simpo,
    "cpo": cpo,
}
"""Every loss that the recipe accepts."""


def needs_step(spec: DpoSpec) -> bool:
    """Whether a pass has to know of the other passes of its step."""
    names = {"kto_pair", "aot", "aot_unpaired", *(["bco_pair"] if spec.bco_shift == "step" else [])}
    return not names.isdisjoint(spec.losses)
