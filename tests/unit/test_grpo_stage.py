"""The stage grpo: recipe and variants, signals, weights, loss; any cut of a step into passes is the step."""

from __future__ import annotations

import dataclasses
import math
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.testing import assert_close

from luthier.experience import Rollout
from luthier.model.logprobs import ModelPolicy, install_target_forward
from luthier.model.rows import Rows
from luthier.recipe.grpo_variants import VARIANTS, Variant
from luthier.recipe.online import GrpoSpec, reward_names
from luthier.stages import build_stage
from luthier.stages.advantages import ADVANTAGES, alone
from luthier.types import RecipeError, Sample
from tests.preference import OPTIONS, divided, gradients_of, made_models
from tests.rollouts import (
    EXACT,
    GivenPolicy,
    learnt_samples,
    made_rollout,
    random_rollout,
    single_answers,
    together,
)

VARIANTS_PAGE = Path(__file__).parents[2] / "docs" / "grpo_variants.md"
BOUND = 7
"""Most tokens of an answer."""


def stage_of(*, share_prompts: bool = False, **fields: Any) -> Any:
    spec = GrpoSpec(rewards=[EXACT], **{"group_size": 3, **fields})
    return build_stage(spec, OPTIONS, share_prompts=share_prompts, temperature=0.7, max_new_tokens=BOUND)


def policy_of(rollout: Rollout, *, moved: float = 0.4, seed: int = 5) -> GivenPolicy:
    """A policy that an update has moved away from what it was, by this deviation."""
    generator = torch.Generator().manual_seed(seed)
    before = torch.from_numpy(rollout.logprobs)
    now = before + moved * torch.randn(before.shape, generator=generator)
    entropy = torch.rand(before.shape, generator=generator)
    return GivenPolicy(now.requires_grad_(), entropy.requires_grad_())


def step(stage: Any, policy: Any, passes: list[list[Sample]]) -> tuple[Tensor, dict[str, float]]:
    """The loss of an optimizer step, and its metrics, with the weights of all its passes."""
    batches = [stage.collate(samples) for samples in passes]
    weights: dict[str, Tensor] = {}
    for batch in batches:
        for name, weight in stage.weight(batch).items():
            weights[name] = weights.get(name, torch.zeros(())) + weight
    losses, metrics = [], dict[str, list[float]]()
    for batch in batches:
        loss_sum = stage.loss(policy, batch, stage.observe(policy, batches))
        assert set(loss_sum.terms) == set(stage.terms) == set(weights)
        losses.append(divided(loss_sum, weights))
        for name, term in loss_sum.metrics.items():
            sums = metrics.setdefault(name, [0.0, 0.0])
            sums[0] += float(term.total)
            sums[1] += float(term.weight)
    return torch.stack(losses).sum(), {name: total / weight for name, (total, weight) in metrics.items()}


# ---- recipe ------------------------------------------------------------------------------------------------


def test_variants_are_those_of_the_schema() -> None:
    assert set(VARIANTS) == set(typing.get_args(Variant))
    assert set(ADVANTAGES) == set(typing.get_args(GrpoSpec.model_fields["advantage"].annotation))


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_a_variant_fills_what_is_not_said(variant: str) -> None:
    preset = VARIANTS[variant]
    spec = GrpoSpec.model_validate({"rewards": [EXACT], "variant": variant})
    for name, value in preset.items():
        if name == "kl":
            assert {key: getattr(spec.kl, key) for key in value} == value
        else:
            assert getattr(spec, name) == value, name
    said = {"aggregation": "constant", "clip": 0.5, "kl": {"coefficient": 0.3, "horizon": 77}}
    own = GrpoSpec.model_validate({"rewards": [EXACT], "variant": variant, **said})
    assert (own.aggregation, own.clip, own.kl.horizon) == ("constant", 0.5, 77)
    assert (own.kl.coefficient, own.kl.estimator) == (0.3, preset["kl"].get("estimator", "k3"))
    # What was resolved and written down reads back as the same recipe.
    assert GrpoSpec.model_validate(own.model_dump(mode="json")) == own


def test_the_table_of_variants_in_the_docs() -> None:
    """Every field that a variant sets stands in its row."""
    rows = {
        cells[0].strip("` "): cells
        for line in VARIANTS_PAGE.read_text(encoding="utf-8").splitlines()
        if (cells := [cell.strip() for cell in line.strip("|").split("|")]) and len(cells) > 9
    }
    header = [
        "advantage",
        "aggregation",
        "ratio",
        "loss",
        "clip",
        "clip_high",
        "kl.coefficient",
        "kl.estimator",
    ]
    for variant in VARIANTS:
        spec = GrpoSpec.model_validate({"rewards": [EXACT], "variant": variant})
        values = [*(getattr(spec, name) for name in header[:6]), spec.kl.coefficient, spec.kl.estimator]
        shown = [
            "-" if value is None else f"{value:g}" if isinstance(value, float) else value for value in values
        ]
        assert rows[variant][1:9] == shown, variant


def test_a_wrong_variant_is_an_error() -> None:
    with pytest.raises(ValidationError, match="variant"):
        GrpoSpec.model_validate({"rewards": [EXACT], "variant": "grpoo"})


def test_names_of_rewards() -> None:
    rewards = [EXACT, {"type": "numeric"}, EXACT, {**EXACT, "name": "numeric"}, EXACT]
    spec = GrpoSpec.model_validate({"rewards": rewards})
    assert reward_names(spec.rewards) == (
        "exact_match",
        "numeric_2",
        "exact_match_2",
        "numeric",
        "exact_match_3",
    )


# ---- signals and the log -----------------------------------------------------------------------------------


def test_signals() -> None:
    """What there is depends on what the loss reads."""
    rollout = random_rollout(2, 3)
    lengths = rollout.lengths
    cases: list[tuple[dict[str, Any], set[str]]] = [
        ({}, {"advantages"}),
        ({"epochs": 2}, {"advantages", "logprobs"}),
        ({"minibatches": 2}, {"advantages", "logprobs"}),
        ({"importance_cap": 2.0}, {"advantages", "logprobs", "sampled"}),
        ({"kl": {"coefficient": 0.1}}, {"advantages", "reference"}),
    ]
    for fields, names in cases:
        signals = stage_of(**fields).signals(rollout, alone)
        assert set(signals) == names
        assert all(
            values.dtype == torch.float32 and len(values) == lengths.sum() for values in signals.values()
        )
    advantages = stage_of().signals(rollout, alone)["advantages"]
    expected = ADVANTAGES["group"](torch.from_numpy(rollout.totals), 3, alone)
    assert_close(advantages, expected.repeat_interleave(torch.from_numpy(lengths)), rtol=0, atol=0)


def test_truncated_answers_are_not_learnt() -> None:
    rollout = made_rollout([[1, 2]], [[5, 6], [7], [8, 9, 3]], [1, 0, 0], truncated=[0, 2])
    assert stage_of().learnt(rollout).tolist() == [True, True, True]
    stage = stage_of(mask_truncated=True)
    assert stage.learnt(rollout).tolist() == [False, True, False]
    # They still count in their group's mean.
    assert (
        stage.signals(rollout, alone)["advantages"].tolist()
        == stage_of().signals(rollout, alone)["advantages"].tolist()
    )
    batch = stage.collate(learnt_samples(stage, rollout, stage.signals(rollout, alone)))
    assert batch.input_ids.tolist() == [[1, 2, 7]]
    assert float(stage.weight(batch)["loss"]) == 1


def test_report() -> None:
    rollout = made_rollout(
        [[1], [2]],
        [[5], [6, 7], [8], [9, 9, 9], [4], [3]],
        [1, 0, 0.5, 2, 2, 2],
        rewards=[[1, 0], [0, 0], [0, 1], [2, 0], [2, 0], [2, 0]],
        truncated=[3],
        logprobs=[-1] * 9,
        reference=[-1.5] * 9,
    )
    spec = GrpoSpec(
        rewards=[EXACT, {**EXACT, "name": "form"}], group_size=3, kl={"coefficient": 0.1, "estimator": "k1"}
    )
    found = {
        name: total / weight for name, (total, weight) in build_stage(spec, OPTIONS).report(rollout).items()
    }
    expected = {
        "reward": 7.5 / 6,
        "reward/exact_match": 7 / 6,
        "reward/form": 1 / 6,
        "reward_std": math.sqrt((1 + 0.25 + 12 - 6 * 1.25**2) / 5),
        "completion/length": 9 / 6,
        "completion/length_max": 3.0,
        "completion/truncated": 1 / 6,
        "group/zero_variance": 0.5,
        "kl": 0.5,
        "kl/answer": 0.75,
        "kl/coefficient": 0.1,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    # The first group: 1, 0, 0.5 have deviation 0.5, so advantages of 1, -1 and 0; the second of 0.
    assert found["advantage/std"] == pytest.approx(math.sqrt(2 / 5), rel=1e-3)
    assert set(found) == {*expected, "advantage/std"}
    bad = dataclasses.replace(rollout.completions[0], bad_scores=3)
    marred = dataclasses.replace(rollout, completions=(bad, *rollout.completions[1:]))
    assert build_stage(spec, OPTIONS).report(marred)["completion/bad_scores"] == (3.0, 6)


def test_the_coefficient_follows_the_divergence() -> None:
    """Per answer 0.75 nats with a target of 0.7: up in proportion, by its share of six answers; then state travels as JSON."""
    kl = {"coefficient": 0.1, "estimator": "k1", "target": 0.7, "horizon": 100}
    rollout = made_rollout(
        [[1], [2]], [[5], [6, 7], [8], [9, 9, 9], [4], [3]], [0] * 6, logprobs=[-1] * 9, reference=[-1.5] * 9
    )
    stage = stage_of(kl=kl)
    stage.signals(rollout, alone)
    assert stage.kl_coefficient == 0.1
    stage.after(rollout, {})
    assert stage.kl_coefficient == pytest.approx(0.1 * (1 + (0.75 / 0.7 - 1) * 6 / 100))
    other = stage_of(kl=kl)
    other.restore(stage.state())
    assert other.kl_coefficient == stage.kl_coefficient
    fixed = stage_of(kl={**kl, "target": None})
    fixed.signals(rollout, alone)
    fixed.after(rollout, {})
    assert fixed.kl_coefficient == 0.1


# ---- the loss ----------------------------------------------------------------------------------------------

FORMS: dict[str, dict[str, Any]] = {
    "token": {},
    "sequence": {"aggregation": "sequence"},
    "constant": {"aggregation": "constant"},
    "uneven clip": {"clip": 0.1, "clip_high": 0.5},
    "gspo": {"ratio": "sequence", "aggregation": "sequence"},
    "product": {"ratio": "product", "aggregation": "sequence"},
    "cispo": {"loss": "cispo", "clip_high": 0.3},
    "kl": {"kl": {"coefficient": 0.3}, "aggregation": "sequence"},
    "entropy": {"entropy": 0.2, "aggregation": "constant"},
    "importance": {"importance_cap": 1.1},
    "all": {
        "kl": {"coefficient": 0.3, "estimator": "k2"},
        "entropy": 0.2,
        "importance_cap": 1.1,
        "ratio": "sequence",
    },
}


def by_hand(spec: GrpoSpec, rollout: Rollout, policy: GivenPolicy) -> Tensor:
    """The loss from its definition, token by token, in float64."""
    advantages = ADVANTAGES[spec.advantage](
        torch.from_numpy(rollout.totals), rollout.group_size, alone
    ).tolist()
    high = spec.clip if spec.clip_high is None else spec.clip_high
    lengths, starts = rollout.lengths.tolist(), [0, *rollout.lengths.cumsum().tolist()]
    answers, entropy = [], torch.zeros((), dtype=torch.float64)
    for number, length in enumerate(lengths):
        places = range(starts[number], starts[number] + length)
        ratios = [policy.logprobs_N[i].double() - float(rollout.logprobs[i]) for i in places]
        whole = torch.stack(ratios).sum()
        tokens = []
        for i, own in zip(places, ratios, strict=True):
            now, advantage = policy.logprobs_N[i].double(), advantages[number]
            r = {"token": own, "sequence": whole / length, "product": whole}[spec.ratio].exp()
            if spec.loss == "cispo":
                loss = -min(float(r.detach()), 1 + high) * advantage * now
            else:
                near = min(max(float(r.detach()), 1 - spec.clip), 1 + high)
                loss = (
                    -r * advantage
                    if float(r.detach()) * advantage <= near * advantage
                    else torch.tensor(-near * advantage)
                )
            if spec.importance_cap is not None:
                loss = loss * min(math.exp(rollout.logprobs[i] - rollout.sampled[i]), spec.importance_cap)
            if spec.kl.coefficient:
                apart = float(rollout.reference[i]) - now  # type: ignore[index]
                estimate = apart.exp() - 1 - apart if spec.kl.estimator == "k3" else apart**2 / 2
                loss = loss + spec.kl.coefficient * estimate
            tokens.append(loss)
            entropy = entropy + policy.entropy_N[i].double()
        answers.append(torch.stack(tokens).sum())
    num_tokens = sum(lengths)
    if spec.aggregation == "token":
        total = torch.stack(answers).sum() / num_tokens
    elif spec.aggregation == "sequence":
        total = torch.stack([answer / n for answer, n in zip(answers, lengths, strict=True)]).mean()
    else:
        total = torch.stack(answers).sum() / (len(answers) * BOUND)
    return total - spec.entropy * entropy / num_tokens


@pytest.mark.parametrize("form", sorted(FORMS))
def test_loss_is_its_definition(form: str) -> None:
    stage, rollout = stage_of(epochs=2, **FORMS[form]), random_rollout(4, 3, seed=2)
    policy = policy_of(rollout)
    samples = learnt_samples(stage, rollout, stage.signals(rollout, alone))
    leaves = [policy.logprobs_N, policy.entropy_N]
    expected = by_hand(stage.spec, rollout, policy)
    wanted = torch.autograd.grad(expected, leaves, allow_unused=True)
    found, _ = step(stage, policy, [samples])
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5, abs=1e-7)
    for own, other in zip(torch.autograd.grad(found, leaves, allow_unused=True), wanted, strict=True):
        other = torch.zeros_like(leaves[0]) if other is None else other
        assert_close(torch.zeros_like(other) if own is None else own, other, rtol=1e-4, atol=1e-6)
    assert policy.asked[0]["temperature"] == 0.7


@pytest.mark.parametrize("form", sorted(FORMS))
def test_the_cut_into_passes_changes_nothing(form: str) -> None:
    """All at once, a prompt each, an answer each, and with passes that have nothing to do."""
    stage, rollout = stage_of(epochs=2, mask_truncated=True, **FORMS[form]), random_rollout(4, 3, seed=4)
    rollout = made_rollout_cut(rollout)
    policy = policy_of(rollout)
    samples = learnt_samples(stage, rollout, stage.signals(rollout, alone))
    assert sorted({len(sample.branches) for sample in samples}) == [1, 2, 3]
    answers, nothing = single_answers(samples), [Sample(samples[0].input_ids[:1], samples[0].weights[:1] * 0)]
    cuts = [[samples], [[sample] for sample in samples], [[answer] for answer in answers]]
    cuts.append([nothing, answers[:5], nothing, answers[5:]])
    results = [step(stage, policy, cut) for cut in cuts]
    whole = torch.autograd.grad(results[0][0], policy.logprobs_N)[0]
    for loss, metrics in results[1:]:
        assert float(loss.detach()) == pytest.approx(float(results[0][0].detach()), rel=1e-5)
        assert metrics == pytest.approx(results[0][1], rel=1e-5, abs=1e-7)
        assert_close(torch.autograd.grad(loss, policy.logprobs_N)[0], whole, rtol=1e-5, atol=1e-7)


def made_rollout_cut(rollout: Rollout) -> Rollout:
    """The same with answers 1, 3 and 5 cut by the limit, and all of the last prompt's."""
    cut = {1, 3, 5, 9, 10, 11}
    return dataclasses.replace(
        rollout,
        completions=tuple(
            dataclasses.replace(one, finish="length") if number in cut else one
            for number, one in enumerate(rollout.completions)
        ),
    )


def test_metrics_by_hand() -> None:
    """Two answers of two tokens; ratios 1.5, 0.5 and 1, 2 with advantages 1 and -1; range [0.8, 1.2]."""
    stage = stage_of(epochs=2, group_size=2, advantage="centered")
    rollout = made_rollout([[1]], [[5, 6], [7, 8]], [2, 0], logprobs=[-1.0, -1, -1, -1])
    ratio = torch.tensor([1.5, 0.5, 1.0, 2.0])
    policy = GivenPolicy((ratio.log() - 1).requires_grad_(), torch.tensor([1.0, 2, 3, 4]))
    loss, metrics = step(stage, policy, [learnt_samples(stage, rollout, stage.signals(rollout, alone))])
    assert float(loss.detach()) == pytest.approx((-1.2 - 0.5 + 1 + 2) / 4)
    expected = {
        "entropy": 2.5,
        "approx_kl": float((ratio - 1 - ratio.log()).mean()),
        "ratio/mean": 5 / 4,
        "ratio/max": (1.5 + 2) / 2,
        "clip_fraction": 1 / 4,
        "clip_fraction/low": 0.0,
        "clip_fraction/high": 1 / 4,
        "advantage/mean": 0.0,
    }
    assert metrics == pytest.approx(expected, abs=1e-7)


def test_the_first_update_has_ratio_one() -> None:
    """Without log-probabilities from before the ratio is to the own value: the gradient is that of -A log p."""
    stage, rollout = stage_of(), random_rollout(3, 3)
    policy = policy_of(rollout)
    signals = stage.signals(rollout, alone)
    loss, metrics = step(stage, policy, [learnt_samples(stage, rollout, signals)])
    assert (metrics["ratio/mean"], metrics["ratio/max"], metrics["approx_kl"]) == (1.0, 1.0, 0.0)
    gradient = torch.autograd.grad(loss, policy.logprobs_N)[0]
    assert_close(gradient, -signals["advantages"] / len(gradient), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("form", ["token", "sequence", "constant", "gspo", "product", "cispo"])
def test_the_sign_of_the_advantage(form: str) -> None:
    """A step makes good answers likelier and bad ones less likely; with rewards turned round the opposite."""
    rollout = random_rollout(4, 3, seed=7)
    policy = policy_of(rollout, moved=0.0)
    for sign in (1, -1):
        turned = made_turned(rollout, sign)
        stage = stage_of(epochs=2, **FORMS[form])
        loss, _ = step(stage, policy, [learnt_samples(stage, turned, stage.signals(turned, alone))])
        gradient = torch.autograd.grad(loss, policy.logprobs_N)[0]
        good = stage_of(epochs=2).signals(rollout, alone)["advantages"] > 0
        assert bool((sign * gradient[good] < 0).all())
        assert bool((sign * gradient[~good] > 0).all())


def made_turned(rollout: Rollout, sign: int) -> Rollout:
    return dataclasses.replace(rollout, totals=sign * rollout.totals)


def test_equal_groups_move_nothing() -> None:
    stage = stage_of(epochs=2)
    rollout = made_rollout([[1], [2]], [[5, 6], [7], [8]] * 2, [0.1] * 6, logprobs=[-1] * 8)
    policy = policy_of(rollout)
    loss, _ = step(stage, policy, [learnt_samples(stage, rollout, stage.signals(rollout, alone))])
    assert float(loss.detach()) == 0
    assert torch.autograd.grad(loss, policy.logprobs_N)[0].abs().max() == 0


def test_weights_are_known_before_the_pass() -> None:
    rollout = made_rollout([[1]], [[5, 6], [7], [8, 9, 4]], [1, 0, 0], logprobs=[-1] * 6, reference=[-1] * 6)
    for aggregation, policy_weight in (("token", 6.0), ("sequence", 3.0), ("constant", 3.0 * BOUND)):
        stage = stage_of(aggregation=aggregation, entropy=0.1, kl={"coefficient": 0.1})
        batch = stage.collate(learnt_samples(stage, rollout, stage.signals(rollout, alone)))
        found = {name: float(weight) for name, weight in stage.weight(batch).items()}
        assert found == {"policy": policy_weight, "kl": policy_weight, "entropy": 6.0}
        terms = stage.loss(policy_of(rollout), batch, {}).terms
        assert {name: float(term.weight) for name, term in terms.items()} == found


def test_constant_needs_a_bound() -> None:
    spec = GrpoSpec(rewards=[EXACT], group_size=3, aggregation="constant")
    stage, rollout = build_stage(spec, OPTIONS), random_rollout(1, 3)
    batch = stage.collate(learnt_samples(stage, rollout, stage.signals(rollout, alone)))  # type: ignore[attr-defined]
    with pytest.raises(RecipeError, match=r"generation\.max_new_tokens"):
        stage.weight(batch)


@pytest.mark.parametrize("advantage", ["batch", "reinforce_pp"])
def test_processes_share_a_rollout(advantage: str) -> None:
    rollout, stage = random_rollout(4, 3, seed=9), stage_of(advantage=advantage)
    halves = [part_of_rollout(rollout, 0, 6), part_of_rollout(rollout, 6, 12)]
    parts = together(
        halves, lambda part, total: stage_of(advantage=advantage).signals(part, total)["advantages"]
    )
    assert_close(torch.cat(parts), stage.signals(rollout, alone)["advantages"], rtol=1e-6, atol=1e-7)


def part_of_rollout(rollout: Rollout, start: int, stop: int) -> Rollout:
    bounds = [0, *rollout.lengths.cumsum().tolist()]
    tokens = slice(bounds[start], bounds[stop])
    assert rollout.reference is not None and rollout.values is not None
    return Rollout(
        rollout.completions[start:stop],
        rollout.group_size,
        rollout.rewards[start:stop],
        rollout.totals[start:stop],
        rollout.logprobs[tokens],
        rollout.sampled[tokens],
        rollout.reference[tokens],
        rollout.values[tokens],
    )


# ---- a model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["all", "cispo", "sequence"])
def test_shared_prompts_and_copies(form: str) -> None:
    """Through a model: prompts computed once = once for each answer = one answer at a time."""
    models, rollout = made_models(), random_rollout(3, 3, seed=11)
    install_target_forward(models.policy, Rows(shares_prompts=True))
    policy = ModelPolicy(models.policy)
    results = []
    for shared, cut in ((True, False), (False, False), (True, True)):
        fields = {"epochs": 2, **FORMS[form]}
        spec = GrpoSpec(rewards=[EXACT], group_size=3, **fields)
        stage: Any = build_stage(spec, OPTIONS, share_prompts=shared, max_new_tokens=BOUND)
        samples = learnt_samples(stage, rollout, stage.signals(rollout, alone))
        loss, _ = step(stage, policy, [[one] for one in single_answers(samples)] if cut else [samples])
        loss.backward()  # type: ignore[no-untyped-call]
        results.append((float(loss.detach()), gradients_of(models.policy)))
    for loss, gradients in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-4)
        for name, gradient in gradients.items():
            scale = float(results[0][1][name].abs().max())
            assert_close(gradient, results[0][1][name], rtol=1e-3, atol=1e-4 * scale, msg=name)
