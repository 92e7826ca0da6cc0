"""Advantages, moments, estimators of a divergence and the losses of tokens, against numbers worked out by hand."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from luthier.stages.advantages import (
    ADVANTAGES,
    Moments,
    equal_groups,
    explained,
    generalised_advantages,
    normalised,
    whiten,
)
from luthier.stages.divergence import adapted, estimated
from luthier.stages.policy_losses import (
    answer_log_ratios,
    clipped_shares,
    clipped_surrogate,
    clipped_weight,
    ratios,
    truncated_importance,
    value_loss,
)
from tests.rollouts import together


def near(found: Tensor, expected: list[float], tolerance: float = 1e-6) -> None:
    assert_close(found, torch.tensor(expected, dtype=found.dtype), rtol=tolerance, atol=tolerance)


# ---- generalised advantage estimation ----------------------------------------------------------------------


def test_generalised_advantages_by_hand() -> None:
    """Two answers of 3 tokens and of 1, gamma 0.9, lambda 0.5.

    delta_2 = 1 - 0.75, delta_1 = 0.9 x 0.75 - 0.25, delta_0 = 0.9 x 0.25 - 0.5; A_t = delta_t + 0.45 A_(t+1).
    """
    rewards, values = torch.tensor([0.0, 0, 1, 2]), torch.tensor([0.5, 0.25, 0.75, 1])
    advantages, returns = generalised_advantages(rewards, values, torch.tensor([3, 1]), 0.9, 0.5)
    near(advantages, [-0.033125, 0.5375, 0.25, 1.0])
    near(returns, [0.466875, 0.7875, 1.0, 2.0])


def test_generalised_advantages_at_their_ends() -> None:
    """lambda 1 gives what is still earned less the value; lambda 0 the error of one step."""
    rewards, values = torch.tensor([1.0, -2, 4]), torch.tensor([0.5, 3, 1])
    lengths = torch.tensor([3])
    monte_carlo, returns = generalised_advantages(rewards, values, lengths, 1.0, 1.0)
    near(monte_carlo, [2.5, -1, 3])
    near(returns, [3, 2, 4])
    one_step, _ = generalised_advantages(rewards, values, lengths, 1.0, 0.0)
    near(one_step, [3.5, -4, 3])


def test_an_answer_knows_nothing_of_the_next() -> None:
    rewards, values = torch.randn(9), torch.randn(9)
    whole, _ = generalised_advantages(rewards, values, torch.tensor([4, 2, 3]), 0.97, 0.9)
    starts = [0, 4, 6, 9]
    for start, stop in pairwise(starts):
        alone, _ = generalised_advantages(
            rewards[start:stop], values[start:stop], torch.tensor([stop - start]), 0.97, 0.9
        )
        assert_close(whole[start:stop], alone, rtol=0, atol=0)


# ---- moments -----------------------------------------------------------------------------------------------


def test_whitening_by_hand() -> None:
    """1, 2, 3, 4 have mean 5 / 2 and variance 5 / 3."""
    values = torch.tensor([1.0, 2, 3, 4])
    root = math.sqrt(5 / 3)
    near(whiten(values), [-1.5 / root, -0.5 / root, 0.5 / root, 1.5 / root])
    near(
        whiten(values, shift_mean=False),
        [2.5 - 1.5 / root, 2.5 - 0.5 / root, 2.5 + 0.5 / root, 2.5 + 1.5 / root],
    )
    masked = whiten(torch.tensor([1.0, 2, 3, 10]), mask=torch.tensor([True, True, True, False]))
    near(masked, [-1, 0, 1, 8])
    near(whiten(torch.tensor([7.0, 7, 7])), [0, 0, 0])
    near(whiten(torch.tensor([7.0])), [0])


@pytest.mark.parametrize("name", ["whiten", "batch", "reinforce_pp"])
def test_processes_agree(name: str) -> None:
    """Each with its part of a rollout: the same numbers as one process with all of it."""
    values = torch.randn(24, generator=torch.Generator().manual_seed(3)) * 3 + 100

    def of(part: Tensor, total: Any) -> Tensor:
        return whiten(part, total) if name == "whiten" else ADVANTAGES[name](part, 4, total)

    whole = together([values], of)[0]
    parts = together([values[:8], values[8:]], of)
    assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-6)
    assert (
        float((torch.cat([together([part], of)[0] for part in (values[:8], values[8:])]) - whole).abs().max())
        > 0.01
    )


def test_moments_merge() -> None:
    """Chan's rule = the moments of all numbers at once; around 10,000, where raw squares would cancel."""
    values = torch.randn(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 1e4
    moments = Moments()
    for part in values.split([20, 1, 29]):
        moments = moments.merged(Moments.of(part))
    assert moments.count == 50
    assert moments.mean == pytest.approx(float(values.mean()), rel=1e-12)
    assert moments.std == pytest.approx(float(values.std()), rel=1e-9)
    assert Moments.restored(moments.state()) == moments
    assert Moments().merged(Moments()) == Moments()


def test_normalised_scores() -> None:
    near(normalised(torch.tensor([2.0, 4, 6]), Moments(3, 4.0, 8.0)), [-1, 0, 1])
    near(normalised(torch.tensor([0.1, 0.1]), Moments.of(torch.tensor([0.1, 0.1]))), [0, 0])


def test_explained_variance() -> None:
    returns = torch.tensor([1.0, 2, 3, 4])
    cases = {1.0: returns, 0.0: torch.full((4,), 9.0), -3.0: -returns, 0.75: returns / 2}
    for expected, values in cases.items():
        total, weight = explained(returns, values)
        assert total / weight == pytest.approx(expected)
    assert explained(torch.ones(3), returns[:3])[1] == 0


# ---- advantages in groups ----------------------------------------------------------------------------------

REWARDS = torch.tensor([1.0, 0, 0, 1, 2, 2, 2, 2, 0, 1, 2, 5])
"""Three groups of four: means 1 / 2, 2, 2; squared distances 1, 0, 14; all twelve: mean 3 / 2, squares 21."""


@pytest.mark.parametrize(
    ("name", "scales"),
    [
        ("group", [1 / (math.sqrt(1 / 3) + 1e-4), 1, 1 / (math.sqrt(14 / 3) + 1e-4)]),
        ("centered", [1, 1, 1]),
        ("rloo", [4 / 3, 4 / 3, 4 / 3]),
        ("batch", [1 / (math.sqrt(21 / 11) + 1e-4)] * 3),
        ("reinforce_pp", [1 / (math.sqrt(15 / 11) + 1e-4)] * 3),
    ],
)
def test_advantages_by_hand(name: str, scales: list[float]) -> None:
    apart = [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0, -2, -1, 0, 3]
    expected = [scales[k // 4] * value for k, value in enumerate(apart)]
    near(ADVANTAGES[name](REWARDS, 4, lambda sums: sums), expected)


def test_leave_one_out_is_less_the_mean_of_the_others() -> None:
    found = ADVANTAGES["rloo"](REWARDS, 4, lambda sums: sums)
    near(found[8:], [0 - 8 / 3, 1 - 7 / 3, 2 - 6 / 3, 5 - 3 / 3])


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_equal_rewards_teach_nothing(name: str) -> None:
    """Also where a mean of equal numbers would round: 0.1 is no float."""
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.3, 0.3, 0.3])
    assert ADVANTAGES[name](rewards, 3, lambda sums: sums).tolist() == [0.0] * 6
    assert equal_groups(REWARDS, 4).tolist() == [False, True, False]


# ---- divergence --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "expected", "slope"),
    [
        ("k1", [math.log(2), -math.log(2)], [1, 1]),
        ("k2", [math.log(2) ** 2 / 2] * 2, [math.log(2), -math.log(2)]),
        ("k3", [0.5 - 1 + math.log(2), 2 - 1 - math.log(2)], [1 - 0.5, 1 - 2.0]),
    ],
)
def test_estimators_by_hand(estimator: str, expected: list[float], slope: list[float]) -> None:
    """Where the reference is half as likely, and twice; the slope is by the policy's log-probability."""
    logprobs = torch.tensor([0.5, 0.25]).log().requires_grad_()
    found = estimated(logprobs, torch.tensor([0.25, 0.5]).log(), estimator)
    near(found.detach(), expected)
    near(torch.autograd.grad(found.sum(), logprobs)[0], slope)


def test_estimators_are_unbiased() -> None:
    """k1 and k3 have KL(policy || reference) as their mean under the policy; k2 is near where both are."""
    policy, reference = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.45, 0.35, 0.2])
    divergence = float((policy * (policy / reference).log()).sum())
    means = {
        name: float((policy * estimated(policy.log(), reference.log(), name)).sum())
        for name in ("k1", "k2", "k3")
    }
    assert means["k1"] == pytest.approx(divergence, rel=1e-5)
    assert means["k3"] == pytest.approx(divergence, rel=1e-5)
    assert means["k2"] == pytest.approx(divergence, rel=0.02)


def test_the_coefficient_adapts() -> None:
    """Too far: up by at most 0.2 n / horizon; near the target in proportion; n = 64, horizon = 1000."""
    assert adapted(0.2, 12.0, 6.0, 1000, 64) == pytest.approx(0.2 * 1.0128)
    assert adapted(0.2, 5.4, 6.0, 1000, 64) == pytest.approx(0.2 * (1 - 0.1 * 0.064))
    assert adapted(0.2, -3.0, 6.0, 1000, 64) == pytest.approx(0.2 * (1 - 0.0128))
    assert adapted(0.2, 6.0, 6.0, 1000, 64) == 0.2


# ---- losses of tokens --------------------------------------------------------------------------------------


def test_clipped_surrogate_by_hand() -> None:
    """Ratios below, inside and above [0.8, 1.3], of good and of bad tokens."""
    ratio = torch.tensor([0.5, 1.1, 2.0, 0.5, 1.1, 2.0], requires_grad=True)
    advantages = torch.tensor([2.0, 2, 2, -2, -2, -2])
    losses = clipped_surrogate(ratio, advantages, 0.2, 0.3)
    near(losses.detach(), [-1.0, -2.2, -2.6, 1.6, 2.2, 4.0])
    near(torch.autograd.grad(losses.sum(), ratio)[0], [-2, -2, 0, 0, 2, 2])
    below, above = clipped_shares(ratio.detach(), advantages, 0.2, 0.3)
    assert below.tolist() == [0, 0, 0, 1, 0, 0]
    assert above.tolist() == [0, 0, 1, 0, 0, 0]


def test_clipped_weight_keeps_every_gradient() -> None:
    """The weight is cut at 1.3 upwards and nowhere downwards."""
    ratio = torch.tensor([0.5, 2.0, 9.0], requires_grad=True)
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 2.0])
    losses = clipped_weight(logprobs, ratio, advantages, 0.3)
    near(losses.detach(), [0.5, -2.6, 7.8])
    own, through = torch.autograd.grad(losses.sum(), [logprobs, ratio], allow_unused=True)
    near(own, [-0.5, 1.3, -2.6])
    assert through is None


def test_value_loss_by_hand() -> None:
    """Values that left [-0.2, 0.2] around what they were: the worse of both errors counts."""
    values = torch.tensor([0.1, 1.0, 1.0, -1.0], requires_grad=True)
    before, returns = torch.zeros(4), torch.tensor([1.0, 1.0, -1.0, 1.0])
    losses = value_loss(values, before, returns, 0.2)
    near(losses.detach(), [0.405, 0.32, 2.0, 2.0])
    near(torch.autograd.grad(losses.sum(), values)[0], [-0.9, 0.0, 2.0, -2.0])
    near(value_loss(values, before, returns, None).detach(), [0.405, 0.0, 2.0, 2.0])


def test_ratios_of_answers() -> None:
    log_ratios, rows = torch.tensor([0.1, 0.3, -0.2]), torch.tensor([0, 0, 1])
    near(answer_log_ratios(log_ratios, rows, 2, "token"), [0.1, 0.3, -0.2])
    near(answer_log_ratios(log_ratios, rows, 2, "sequence"), [0.2, 0.2, -0.2])
    near(answer_log_ratios(log_ratios, rows, 2, "product"), [0.4, 0.4, -0.2])


def test_a_ratio_beyond_every_number_has_no_nan() -> None:
    """exp(200) is no float32; the loss of a good token is cut, and its gradient 0."""
    log_ratios = torch.tensor([200.0], requires_grad=True)
    loss = clipped_surrogate(ratios(log_ratios), torch.tensor([1.0]), 0.2, 0.2)
    near(loss.detach(), [-1.2])
    assert torch.autograd.grad(loss.sum(), log_ratios)[0].tolist() == [0.0]


def test_truncated_importance_by_hand() -> None:
    logprobs = torch.tensor([0.5, 0.1, 0.4]).log().requires_grad_()
    weights = truncated_importance(logprobs, torch.tensor([0.25, 0.4, 0.04]).log(), 3.0)
    near(weights, [2.0, 0.25, 3.0])
    assert not weights.requires_grad
