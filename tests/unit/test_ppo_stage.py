"""The stage ppo: scores, rewards of tokens, advantages, the loss of policy and critic, what it keeps between rollouts."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from luthier.experience import Rollout
from luthier.recipe.online import PpoSpec
from luthier.stages import build_stage
from luthier.stages.advantages import Moments, alone, whiten
from luthier.types import Sample
from tests.preference import OPTIONS, divided
from tests.rollouts import EXACT, GivenPolicy, learnt_samples, made_rollout, random_rollout, together

NO_KL = {"coefficient": 0.0}


def stage_of(**fields: Any) -> Any:
    spec = PpoSpec(rewards=[EXACT], **fields)
    return build_stage(spec, OPTIONS, share_prompts=True, temperature=1.3, max_new_tokens=7)


def policy_of(rollout: Rollout, *, moved: float = 0.4, seed: int = 5) -> GivenPolicy:
    """Policy and critic that an update has moved away from what they were."""
    generator = torch.Generator().manual_seed(seed)
    assert rollout.values is not None
    before, values = torch.from_numpy(rollout.logprobs), torch.from_numpy(rollout.values)
    now = before + moved * torch.randn(before.shape, generator=generator)
    critic = values + moved * torch.randn(before.shape, generator=generator)
    entropy = torch.rand(before.shape, generator=generator)
    return GivenPolicy(now.requires_grad_(), entropy.requires_grad_(), critic.requires_grad_())


def step(stage: Any, policy: Any, passes: list[list[Sample]]) -> tuple[Tensor, dict[str, float]]:
    """The loss of an optimizer step, and its metrics."""
    batches = [stage.collate(samples) for samples in passes]
    weights = {name: torch.zeros(()) for name in stage.terms}
    for batch in batches:
        for name, weight in stage.weight(batch).items():
            weights[name] = weights[name] + weight
    losses, metrics = [], dict[str, list[float]]()
    for batch in batches:
        loss_sum = stage.loss(policy, batch, {})
        losses.append(divided(loss_sum, weights))
        for name, term in loss_sum.metrics.items():
            sums = metrics.setdefault(name, [0.0, 0.0])
            sums[0] += float(term.total)
            sums[1] += float(term.weight)
    return torch.stack(losses).sum(), {name: total / weight for name, (total, weight) in metrics.items()}


# ---- signals -----------------------------------------------------------------------------------------------

HAND = made_rollout(
    [[1], [2]],
    [[5, 6], [7]],
    [1.0, -2.0],
    truncated=[1],
    logprobs=[-1.0, -2.0, -0.5],
    reference=[-1.5, -1.0, -0.5],
    values=[0.5, 0.25, 1.0],
)
"""Two answers; the second was cut. log(policy / reference) is 0.5, -1 and 0."""


@pytest.mark.parametrize(
    ("estimator", "penalties"),
    [
        ("k1", [0.5, -1.0, 0.0]),
        ("k2", [0.125, 0.5, 0.0]),
        ("k3", [math.exp(-0.5) - 1 + 0.5, math.exp(1) - 1 - 1, 0.0]),
    ],
)
def test_rewards_of_tokens_by_hand(estimator: str, penalties: list[float]) -> None:
    """-0.1 times the divergence at each token, and the score at the last, less 3 where the end is missing; gamma 1,
    lambda 1: an advantage is all that is still earned less the value."""
    kl = {"coefficient": 0.1, "estimator": estimator, "target": None}
    stage = stage_of(kl=kl, trace=1.0, whiten_advantages=False, missing_end_penalty=3.0)
    signals = stage.signals(HAND, alone)
    rewards = [-0.1 * penalties[0], -0.1 * penalties[1] + 1.0, -0.1 * penalties[2] - 5.0]
    returns = [rewards[0] + rewards[1], rewards[1], rewards[2]]
    assert signals["returns"].tolist() == pytest.approx(returns, rel=1e-6)
    assert signals["advantages"].tolist() == pytest.approx(
        [returns[0] - 0.5, returns[1] - 0.25, returns[2] - 1.0], rel=1e-6
    )
    assert signals["values"].tolist() == [0.5, 0.25, 1.0]
    assert signals["logprobs"].tolist() == [-1.0, -2.0, -0.5]
    assert set(signals) == {"advantages", "returns", "values", "logprobs"}


def test_without_divergence_no_reference() -> None:
    stage = stage_of(kl=NO_KL, trace=1.0, whiten_advantages=False)
    assert (stage.needs_reference, stage.needs_values, stage.group_size) == (False, True, 1)
    assert stage_of().needs_reference
    rollout = dataclasses.replace(HAND, reference=None)
    assert stage.signals(rollout, alone)["returns"].tolist() == [1.0, 1.0, -2.0]


def test_whitened_advantages() -> None:
    """Those of answers that are learnt have mean 0 and variance 1, over all their tokens."""
    rollout = random_rollout(6, 1, seed=3)
    plain = stage_of(whiten_advantages=False).signals(rollout, alone)
    white = stage_of().signals(rollout, alone)
    assert_close(white["advantages"], whiten(plain["advantages"]), rtol=1e-6, atol=1e-6)
    assert float(white["advantages"].mean()) == pytest.approx(0, abs=1e-6)
    assert float(white["advantages"].var()) == pytest.approx(1, rel=1e-5)
    assert_close(white["returns"], plain["returns"], rtol=0, atol=0)
    cut = dataclasses.replace(
        rollout,
        completions=(dataclasses.replace(rollout.completions[0], finish="length"), *rollout.completions[1:]),
    )
    masked = stage_of(mask_truncated=True).signals(cut, alone)["advantages"][len(cut.completions[0]) :]
    assert float(masked.mean()) == pytest.approx(0, abs=1e-6)
    assert float(masked.var()) == pytest.approx(1, rel=1e-5)


def test_whitened_rewards() -> None:
    """Rewards 0, 1, -2 have mean -1 / 3 and variance 7 / 3."""
    rollout = dataclasses.replace(HAND, reference=None)
    stage = stage_of(kl=NO_KL, trace=1.0, whiten_advantages=False, whiten_rewards=True)
    white = [(reward + 1 / 3) / math.sqrt(7 / 3) - 1 / 3 for reward in (0, 1, -2)]
    expected = [white[0] + white[1], white[1], white[2]]
    assert stage.signals(rollout, alone)["returns"].tolist() == pytest.approx(expected, rel=1e-6)


def test_scores_are_normalised_by_all_so_far() -> None:
    """Scores 1, 3 and then 5, 7: the second rollout is measured by mean 4 and deviation sqrt(20 / 3)."""
    stage = stage_of(kl=NO_KL, trace=1.0, whiten_advantages=False, score_norm=True)
    first = made_rollout([[1], [2]], [[5], [6]], [1, 3], values=[0, 0])
    second = made_rollout([[1], [2]], [[5], [6]], [5, 7], values=[0, 0])
    root = math.sqrt(2)
    assert stage.signals(first, alone)["returns"].tolist() == pytest.approx([-1 / root, 1 / root])
    assert stage.signals(first, alone)["returns"].tolist() == pytest.approx([-1 / root, 1 / root])
    stage.after(first, {})
    spread = math.sqrt(20 / 3)
    assert stage.signals(second, alone)["returns"].tolist() == pytest.approx([1 / spread, 3 / spread])
    stage.after(second, {})
    assert stage.state()["scores"] == Moments.of(torch.tensor([1.0, 3, 5, 7])).state()
    cut = stage_of(kl=NO_KL, trace=1.0, whiten_advantages=False, score_clip=2.0)
    assert cut.signals(second, alone)["returns"].tolist() == [2.0, 2.0]


def test_what_is_kept_between_rollouts() -> None:
    """A stage that was restored goes on as the first would have: coefficient and moments, through JSON."""
    fields = {"score_norm": True, "kl": {"coefficient": 0.2, "estimator": "k1", "target": 6.0, "horizon": 50}}
    rollouts = [random_rollout(4, 1, seed=seed) for seed in (1, 2, 3)]
    whole = stage_of(**fields)
    for rollout in rollouts[:2]:
        whole.signals(rollout, alone)
        whole.after(rollout, {})
    resumed = stage_of(**fields)
    resumed.restore(json.loads(json.dumps(whole.state())))
    for name, values in whole.signals(rollouts[2], alone).items():
        assert torch.equal(resumed.signals(rollouts[2], alone)[name], values)
    # Far below the target: twice down by the full fifth of 4 answers in 50.
    assert whole.kl_coefficient == pytest.approx(0.2 * (1 - 0.2 * 4 / 50) ** 2)
    fresh = stage_of(**fields).signals(rollouts[2], alone)
    assert not torch.equal(fresh["returns"], whole.signals(rollouts[2], alone)["returns"])


def test_processes_share_a_rollout() -> None:
    """Scores, rewards and advantages are measured by the whole rollout, and the coefficient moves by it."""
    kl = {"coefficient": 0.2, "estimator": "k1", "target": 1.0, "horizon": 50}
    fields = {"score_norm": True, "whiten_rewards": True, "kl": kl}
    rollout = random_rollout(6, 1, seed=8)
    bounds = [0, *rollout.lengths.cumsum().tolist()]

    def part(start: int, stop: int) -> Rollout:
        tokens = slice(bounds[start], bounds[stop])
        assert rollout.reference is not None and rollout.values is not None
        return Rollout(
            rollout.completions[start:stop],
            1,
            rollout.rewards[start:stop],
            rollout.totals[start:stop],
            rollout.logprobs[tokens],
            rollout.sampled[tokens],
            rollout.reference[tokens],
            rollout.values[tokens],
        )

    def run(own: Rollout, total: Any) -> tuple[dict[str, Tensor], float]:
        stage = stage_of(**fields)
        signals = stage.signals(own, total)
        stage.after(own, {})
        return signals, stage.kl_coefficient

    ((whole, coefficient),) = together([rollout], run)
    (first, one), (second, other) = together([part(0, 2), part(2, 6)], run)
    assert one == other == pytest.approx(coefficient, rel=1e-12)
    for name, values in whole.items():
        assert_close(torch.cat((first[name], second[name])), values, rtol=1e-5, atol=1e-6)


def test_report() -> None:
    stage = stage_of(kl={"coefficient": 0.1, "estimator": "k1"}, trace=1.0, missing_end_penalty=3.0)
    found = {name: total / weight for name, (total, weight) in stage.report(HAND).items()}
    returns = torch.tensor([1.05, 1.1, -5.0], dtype=torch.float64)
    values = torch.tensor([0.5, 0.25, 1.0], dtype=torch.float64)
    errors = returns - values
    expected = {
        "reward": -0.5,
        "reward/exact_match": -0.5,
        "reward_std": math.sqrt(4.5),
        "score": -2.0,
        "completion/length": 1.5,
        "completion/length_max": 2.0,
        "completion/truncated": 0.5,
        "kl": -0.5 / 3,
        "kl/answer": -0.25,
        "kl/coefficient": 0.1,
        "value/mean": 1.75 / 3,
        "value/explained_variance": float(1 - errors.var() / returns.var()),
        "return/mean": float(returns.mean()),
        "advantage/std": float(errors.std()),
    }
    assert found == pytest.approx(expected, rel=1e-5)


# ---- the loss ----------------------------------------------------------------------------------------------

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "uneven clip": {"clip": 0.1, "clip_high": 0.4},
    "values not clipped": {"value_clip": None, "value_weight": 0.7},
    "entropy": {"entropy": 0.3},
    "importance": {"importance_cap": 1.1},
}


def by_hand(spec: PpoSpec, rollout: Rollout, signals: dict[str, Tensor], policy: GivenPolicy) -> Tensor:
    """The loss from its definition, token by token, in float64."""
    high = spec.clip if spec.clip_high is None else spec.clip_high
    total = torch.zeros((), dtype=torch.float64)
    assert rollout.values is not None and policy.values_N is not None
    for i in range(len(rollout.logprobs)):
        advantage, target = float(signals["advantages"][i]), float(signals["returns"][i])
        ratio = (policy.logprobs_N[i].double() - float(rollout.logprobs[i])).exp()
        near = min(max(float(ratio.detach()), 1 - spec.clip), 1 + high)
        surrogate = (
            ratio * advantage if float(ratio.detach()) * advantage <= near * advantage else near * advantage
        )
        if spec.importance_cap is not None:
            engine = math.exp(float(rollout.logprobs[i]) - float(rollout.sampled[i]))
            surrogate = surrogate * min(engine, spec.importance_cap)
        value, before = policy.values_N[i].double(), float(rollout.values[i])
        error = (value - target) ** 2
        if spec.value_clip is not None:
            moved = before + min(max(float(value.detach()) - before, -spec.value_clip), spec.value_clip)
            if abs(float(value.detach()) - before) > spec.value_clip and (moved - target) ** 2 > float(
                error.detach()
            ):
                error = torch.tensor((moved - target) ** 2, dtype=torch.float64)
        total = (
            total - surrogate + spec.value_weight * error / 2 - spec.entropy * policy.entropy_N[i].double()
        )
    return total / len(rollout.logprobs)


@pytest.mark.parametrize("form", sorted(FORMS))
def test_loss_is_its_definition(form: str) -> None:
    stage, rollout = stage_of(**FORMS[form]), random_rollout(8, 1, seed=2)
    policy, signals = policy_of(rollout), stage.signals(rollout, alone)
    assert policy.values_N is not None
    leaves = [policy.logprobs_N, policy.values_N, policy.entropy_N]
    expected = by_hand(stage.spec, rollout, signals, policy)
    found, _ = step(stage, policy, [learnt_samples(stage, rollout, signals)])
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    wanted = torch.autograd.grad(expected, leaves, allow_unused=True)
    for own, other in zip(torch.autograd.grad(found, leaves, allow_unused=True), wanted, strict=True):
        zero = torch.zeros_like(leaves[0])
        assert_close(zero if own is None else own, zero if other is None else other, rtol=1e-4, atol=1e-6)
    assert policy.asked[0]["temperature"] == 1.3
    assert policy.asked[0]["values"]


@pytest.mark.parametrize("form", sorted(FORMS))
def test_the_cut_into_passes_changes_nothing(form: str) -> None:
    stage, rollout = stage_of(mask_truncated=True, **FORMS[form]), random_rollout(8, 1, seed=6)
    completions = list(rollout.completions)
    completions[2] = dataclasses.replace(completions[2], finish="length")
    rollout = dataclasses.replace(rollout, completions=tuple(completions))
    policy = policy_of(rollout)
    assert policy.values_N is not None
    samples = learnt_samples(stage, rollout, stage.signals(rollout, alone))
    assert len(samples) == 7
    nothing = [Sample(samples[0].input_ids[:1], samples[0].weights[:1] * 0)]
    cuts = [[samples], [[sample] for sample in samples], [nothing, samples[:3], nothing, samples[3:]]]
    results = [step(stage, policy, cut) for cut in cuts]
    leaves = [policy.logprobs_N, policy.values_N]
    whole = torch.autograd.grad(results[0][0], leaves)
    for loss, metrics in results[1:]:
        assert float(loss.detach()) == pytest.approx(float(results[0][0].detach()), rel=1e-5)
        assert metrics == pytest.approx(results[0][1], rel=1e-5, abs=1e-7)
        for own, other in zip(torch.autograd.grad(loss, leaves), whole, strict=True):
            assert_close(own, other, rtol=1e-5, atol=1e-7)


def test_metrics_by_hand() -> None:
    """Ratios 1.5 and 0.5 with advantages 0.75 and -2.25; values moved by 0.1 and by 0.5."""
    stage = stage_of(kl=NO_KL, trace=1.0, whiten_advantages=False)
    rollout = made_rollout([[1], [2]], [[5], [6]], [1, -2], logprobs=[-1, -1], values=[0.25, 0.25])
    ratio = torch.tensor([1.5, 0.5])
    policy = GivenPolicy(ratio.log() - 1, torch.tensor([1.0, 2.0]), torch.tensor([0.35, 0.75]))
    signals = stage.signals(rollout, alone)
    loss, metrics = step(stage, policy, [learnt_samples(stage, rollout, signals)])
    surrogates = -1.2 * 0.75 + 0.8 * 2.25
    errors = (0.35 - 1) ** 2 / 2 + (0.75 + 2) ** 2 / 2
    assert float(loss) == pytest.approx((surrogates + 0.1 * errors) / 2, rel=1e-6)
    expected = {
        "entropy": 1.5,
        "approx_kl": float((ratio - 1 - ratio.log()).mean()),
        "ratio/mean": 1.0,
        "ratio/max": 1.0,
        "clip_fraction": 1.0,
        "clip_fraction/low": 0.5,
        "clip_fraction/high": 0.5,
        "advantage/mean": -0.75,
        "value/clip_fraction": 0.5,
    }
    assert metrics == pytest.approx(expected)


def test_the_sign_of_the_advantage() -> None:
    """At the first update a step makes tokens likelier whose advantage is positive; turned round, less likely."""
    rollout, stage = random_rollout(6, 1, seed=4), stage_of()
    policy = policy_of(rollout, moved=0.0)
    signals = stage.signals(rollout, alone)
    for sign in (1, -1):
        turned = {**signals, "advantages": sign * signals["advantages"]}
        loss, _ = step(stage, policy, [learnt_samples(stage, rollout, turned)])
        gradient = torch.autograd.grad(loss, policy.logprobs_N)[0]
        assert_close(gradient, -sign * signals["advantages"] / len(gradient), rtol=1e-5, atol=1e-8)


def test_terms_and_weights() -> None:
    rollout = made_rollout(
        [[1], [2]], [[5, 6], [7]], [1, 0], logprobs=[-1] * 3, reference=[-1] * 3, values=[0] * 3
    )
    for entropy, terms in ((0.0, ("policy", "value")), (0.1, ("policy", "value", "entropy"))):
        stage = stage_of(entropy=entropy)
        assert (stage.terms, stage.kind, stage.share_prompts) == (terms, "prompt", False)
        batch = stage.collate(learnt_samples(stage, rollout, stage.signals(rollout, alone)))
        assert {name: float(weight) for name, weight in stage.weight(batch).items()} == dict.fromkeys(
            terms, 3.0
        )
