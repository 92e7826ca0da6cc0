"""What an answer, or a token of it, is worth beside the others: advantages, and the statistics that they take.

Pure functions. Shapes: B answers, those to one prompt beside each other, G to each; N tokens of all answers in their
order. `Total` adds a tensor of sums over all processes, so that a statistic is that of the whole rollout; `alone` is
that of one process. Sums are taken in float64: a rollout's statistics do not depend on how it is shared out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Total = Callable[[Tensor], Tensor]

GROUP_EPSILON = 1e-4
"""Added to a deviation of rewards that divides: groups that differ by rounding alone earn nothing."""
WHITEN_EPSILON = 1e-8
"""Added to a variance that is divided by."""


def alone(sums: Tensor) -> Tensor:
    """The sums over all processes where there is one."""
    return sums


# --------------------------------------------------------------------------------------------------
# Moments


@dataclass(frozen=True, slots=True)
class Moments:
    """How many numbers there were, their mean, and the sum of their squared distances from it."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values: Tensor, total: Total = alone) -> Moments:
        """Those of all numbers of all processes; around the mean, not from raw squares, which would cancel."""
        values = values.double()
        ones = torch.ones_like(values)
        count, summed = total(torch.stack([ones.sum(), values.sum()])).tolist()
        mean = summed / count if count else 0.0
        (squares,) = total((values - mean).square().sum()[None]).tolist()
        return cls(count, mean, squares)

    def merged(self, other: Moments) -> Moments:
        """Those of both together (Chan, Golub and LeVeque, 1979; Welford, 1962, for one number at a time)."""
        count = self.count + other.count
        if not count:
            return self
        apart, share = other.mean - self.mean, other.count / count
        squares = self.squares + other.squares + apart * apart * self.count * share
        return Moments(count, self.mean + apart * share, squares)

    @property
    def variance(self) -> float:
        """Without bias (divided by count - 1); 0 of fewer than two numbers."""
        return self.squares / (self.count - 1) if self.count > 1 else 0.0

    @property
    def std(self) -> float:
        return math.sqrt(self.variance)

    def state(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Moments:
        return cls(float(state["count"]), float(state["mean"]), float(state["squares"]))


def normalised(scores: Tensor, moments: Moments) -> Tensor:
    """(s - mean) / std with the moments of all scores so far, these among them; 0 where none differ."""
    return ((scores.double() - moments.mean) / (moments.std + WHITEN_EPSILON)).float()


def whiten(
    values: Tensor, total: Total = alone, *, mask: Tensor | None = None, shift_mean: bool = True
) -> Tensor:
    """Numbers brought to variance 1, and to mean 0 unless `shift_mean` is false, which keeps the mean.

    `mask` says which numbers count for the statistics; all are moved by them (Andrychowicz et al., 2020,
    arXiv:2006.05990, section 3.5; Ziegler et al., 2019, arXiv:1909.08593, keep the mean of rewards).
    """
    moments = Moments.of(values if mask is None else values[mask], total)
    white = (values.double() - moments.mean) / math.sqrt(moments.variance + WHITEN_EPSILON)
    return (white if shift_mean else white + moments.mean).float()


def explained(returns: Tensor, values: Tensor) -> tuple[float, float]:
    """How much of the variance of returns the values explain, as a sum and its weight: their quotient is
    1 - Var(returns - values) / Var(returns), 1 for a perfect critic and 0 for a constant one."""
    around, errors = Moments.of(returns), Moments.of(returns.double() - values.double())
    return around.squares - errors.squares, around.squares


# --------------------------------------------------------------------------------------------------
# Of tokens


def generalised_advantages(
    rewards: Tensor, values: Tensor, lengths: Tensor, discount: float, trace: float
) -> tuple[Tensor, Tensor]:
    """(N,) advantages and (N,) returns by GAE (Schulman et al., 2015, arXiv:1506.02438, equation 16).

    delta_t = r_t + discount v_(t+1) - v_t and A_t = delta_t + discount trace A_(t+1), both 0 behind an answer's last
    token, a cut one's too; returns are A + v. `lengths` (B,) are the tokens of each answer.
    """
    lengths = lengths.to(values.device)
    places = torch.arange(len(values), device=values.device)
    starts = lengths.cumsum(0) - lengths
    rows = torch.repeat_interleave(torch.arange(len(lengths), device=values.device), lengths)
    columns = places - starts[rows]
    longest = int(lengths.max()) if len(lengths) else 0
    grid_BL = torch.zeros(2, len(lengths), longest + 1, dtype=torch.float64, device=values.device)
    grid_BL[0, rows, columns], grid_BL[1, rows, columns] = rewards.double(), values.double()
    rewards_BL, values_BL = grid_BL
    deltas_BL = rewards_BL[:, :-1] + discount * values_BL[:, 1:] - values_BL[:, :-1]
    advantages_BL, after_B = torch.zeros_like(deltas_BL), torch.zeros_like(deltas_BL[:, :1]).squeeze(1)
    for step in reversed(range(longest)):
        after_B = deltas_BL[:, step] + discount * trace * after_B
        advantages_BL[:, step] = after_B
    advantages = advantages_BL[rows, columns]
    return advantages.float(), (advantages + values.double()).float()


# --------------------------------------------------------------------------------------------------
# Of answers in groups


def _centered(totals: Tensor, group_size: int) -> Tensor:
    """(P, G) float64: rewards less their group's mean. Rounding leaves no trace in a group of equal rewards."""
    grouped = totals.double().reshape(-1, group_size)
    apart = grouped - grouped.mean(dim=1, keepdim=True)
    return torch.where(equal_groups(totals, group_size)[:, None], 0.0, apart)


def equal_groups(totals: Tensor, group_size: int) -> Tensor:
    """(P,) bool: whether all answers to a prompt have the same reward, so that none teaches anything."""
    grouped = totals.reshape(-1, group_size)
    return grouped.amax(dim=1) == grouped.amin(dim=1)


def group(totals: Tensor, group_size: int, total: Total = alone) -> Tensor:
    """(r - mean of the group) / std of the group (Shao et al., 2024, arXiv:2402.03300, section 4.1.2)."""
    apart = _centered(totals, group_size)
    deviation = totals.double().reshape(-1, group_size).std(dim=1, keepdim=True)
    return (apart / (deviation + GROUP_EPSILON)).flatten().float()


def centered(totals: Tensor, group_size: int, total: Total = alone) -> Tensor:
    """r - mean of the group: nothing is divided, so easy and hard prompts weigh the same (Liu et al., 2025,
    arXiv:2503.20783, section 3.2)."""
    return _centered(totals, group_size).flatten().float()


def leave_one_out(totals: Tensor, group_size: int, total: Total = alone) -> Tensor:
    """r - mean of the others of the group (Ahmadian et al., 2024, arXiv:2402.14740, section 2.3): the centered
    advantage times G / (G - 1)."""
    return (_centered(totals, group_size) * (group_size / (group_size - 1))).flatten().float()


def over_batch(totals: Tensor, group_size: int, total: Total = alone) -> Tensor:
    """(r - mean of the group) / std of the rewards of the whole rollout (Liu et al., 2025, arXiv:2508.08221)."""
    deviation = Moments.of(totals, total).std
    return (_centered(totals, group_size) / (deviation + GROUP_EPSILON)).flatten().float()


def reinforce_pp(totals: Tensor, group_size: int, total: Total = alone) -> Tensor:
    """(r - mean of the group), divided by the deviation of what is left over the whole rollout (Hu et al., 2025,
    arXiv:2501.03262, REINFORCE++ with baseline)."""
    apart = _centered(totals, group_size).flatten()
    return (apart / (Moments.of(apart, total).std + GROUP_EPSILON)).float()


ADVANTAGES: dict[str, Callable[[Tensor, int, Total], Tensor]] = {
    "group": group,
    "centered": centered,
    "rloo": leave_one_out,
    "batch": over_batch,
    "reinforce_pp": reinforce_pp,
}
"""What `stage.advantage` may name: (B,) rewards and the size of a group -> (B,) advantages."""
