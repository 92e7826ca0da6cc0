"""The stage dpo: its recipe, batches, terms, metrics and what it observes."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from luthier.recipe.stage import DpoSpec
from luthier.stages import build_stage
from luthier.stages.answers import row_keys, token_rows
from luthier.stages.pair_losses import LOSSES, Answers, Pairs, Step, needs_step
from luthier.types import Batch, Sample, TokenLogprobs
from tests.preference import OPTIONS, gradients_of, made_models, made_sample, random_pairs


class PositionPolicy:
    """Says -0.01 (1 + position) of each target, and the reference half of it; counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def logprobs(self, batch: Batch, *, entropy: bool = False, mean_logprobs: bool = False) -> TokenLogprobs:
        self.asked.append("policy")
        places = (batch.targets >= 0).nonzero()[:, 0]
        return TokenLogprobs(-0.01 * (1 + batch.position_ids[0, places]).float())

    def reference_logprobs(self, batch: Batch) -> Tensor:
        logprobs = self.logprobs(batch).logprobs / 2
        self.asked[-1] = "reference"
        return logprobs

    def scores(self, batch: Batch) -> Tensor:
        raise AssertionError("dpo asks for no scores")


def pairs_of_lengths(*lengths: tuple[int, int, int]) -> list[Sample]:
    """Prompts of the first length and answers of the others."""
    return [made_sample([[5] * n for n in row], index) for index, row in enumerate(lengths)]


def sums(prompt: int, answer: int, tail: float = 1.0, shared: int | None = None) -> float:
    """What PositionPolicy says of an answer: its first token is predicted at position prompt - 1."""
    weights = [1.0 if shared is None or i < shared else tail for i in range(answer)]
    return float(-0.01 * sum(w * (prompt + i) for i, w in enumerate(weights)))


@pytest.mark.parametrize("share_prompts", [False, True])
def test_numbers_of_answers(share_prompts: bool) -> None:
    stage = build_stage(DpoSpec(beta=0.5, sft_weight=2.0), OPTIONS, share_prompts=share_prompts)
    shapes = [(4, 3, 2), (2, 1, 5), (1, 2, 2)]
    batch = stage.collate(pairs_of_lengths(*shapes))
    loss_sum = stage.loss(PositionPolicy(), batch, {})
    chosen = np.array([sums(p, c) for p, c, _ in shapes])
    rejected = np.array([sums(p, r) for p, _, r in shapes])
    margins = 0.5 * (chosen - rejected) / 2
    assert float(loss_sum.terms["preference"].total) == pytest.approx(
        np.log1p(np.exp(-margins)).sum(), rel=1e-5
    )
    nll = -chosen / np.array([c for _, c, _ in shapes])
    assert float(loss_sum.terms["sft"].total) == pytest.approx(2.0 * nll.sum(), rel=1e-5)
    assert stage.terms == tuple(loss_sum.terms) == ("preference", "sft")
    assert {name: float(weight) for name, weight in stage.weight(batch).items()} == {
        "preference": 3,
        "sft": 3,
    }
    assert {float(term.weight) for term in (*loss_sum.terms.values(), *loss_sum.metrics.values())} == {3.0}
    expected = {
        "rewards/chosen": 0.5 * chosen / 2,
        "rewards/rejected": 0.5 * rejected / 2,
        "rewards/accuracies": (chosen > rejected).astype(float),
        "rewards/margins": margins,
        "logps/chosen": chosen,
        "logps/rejected": rejected,
        "nll_loss": nll,
    }
    assert set(loss_sum.metrics) == set(expected)
    for name, values in expected.items():
        assert float(loss_sum.metrics[name].total) == pytest.approx(values.sum(), rel=1e-5), name


def test_length_desensitised() -> None:
    """Tokens beyond the shorter answer count less, in what is compared; `logps` stay what they are."""
    stage = build_stage(DpoSpec(beta=0.5, ld_alpha=0.25), OPTIONS)
    batch = stage.collate(pairs_of_lengths((4, 3, 2), (2, 1, 5)))
    metrics = stage.loss(PositionPolicy(), batch, {}).metrics
    chosen = sums(4, 3, 0.25, 2) + sums(2, 1)
    rejected = sums(4, 2) + sums(2, 5, 0.25, 1)
    assert float(metrics["rewards/chosen"].total) == pytest.approx(0.25 * chosen, rel=1e-5)
    assert float(metrics["rewards/rejected"].total) == pytest.approx(0.25 * rejected, rel=1e-5)
    assert float(metrics["logps/chosen"].total) == pytest.approx(sums(4, 3) + sums(2, 1), rel=1e-5)
    assert float(metrics["logps/rejected"].total) == pytest.approx(sums(4, 2) + sums(2, 5), rel=1e-5)


@pytest.mark.parametrize("loss", ["orpo", "simpo", "cpo"])
def test_without_a_reference(loss: str) -> None:
    stage = build_stage(DpoSpec.model_validate({"loss": loss, "beta": 0.5}), OPTIONS)
    assert not stage.needs_reference
    policy = PositionPolicy()
    loss_sum = stage.loss(policy, stage.collate(pairs_of_lengths((4, 3, 2))), {})
    assert policy.asked == ["policy"]
    length = 1 if loss == "cpo" else 3
    assert float(loss_sum.metrics["rewards/chosen"].total) == pytest.approx(0.5 * sums(4, 3) / length)
    assert ("log_odds_ratio" in loss_sum.metrics) == (loss == "orpo")
    assert ("nll_loss" in loss_sum.metrics) == (loss != "simpo")


def test_several_losses() -> None:
    weights = {"sigmoid": 0.7, "hinge": 2.0, "simpo": 0.1}
    samples = pairs_of_lengths((4, 3, 2), (2, 1, 5))

    def loss_of(spec: dict[str, Any]) -> Any:
        stage = build_stage(DpoSpec.model_validate(spec), OPTIONS)
        assert stage.needs_reference == (spec["loss"] != "simpo")
        return stage.loss(PositionPolicy(), stage.collate(samples), {})

    together = loss_of({"loss": weights})
    alone = {name: loss_of({"loss": name}).terms["loss"].total for name in weights}
    expected = sum(weight * float(alone[name]) for name, weight in weights.items())
    assert float(together.terms["loss"].total) == pytest.approx(expected, rel=1e-6)
    for name, total in alone.items():
        assert float(together.metrics[f"loss/{name}"].total) == pytest.approx(float(total), rel=1e-6)


# ---- nothing to do -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_a_process_with_nothing_to_do(loss: str) -> None:
    """One token without branches: no pairs, no weight, a loss of 0 with gradients of 0, alone or beside others."""
    needed = {"label_smoothing": 0.1} if loss == "exo_pair" else {}
    stage = build_stage(DpoSpec.model_validate({"loss": loss, "sft_weight": 0.5, **needed}), OPTIONS)
    models = made_models()
    policy = models.handle()
    batch = stage.collate([Sample(np.array([5], np.int32), np.zeros(1, np.float32))])
    assert {float(weight) for weight in stage.weight(batch).values()} == {0.0}
    with torch.no_grad():
        beside = stage.observe(policy, [batch, stage.collate(random_pairs(3))])
    for observed in ({}, beside):
        loss_sum = stage.loss(policy, batch, observed)
        total = torch.stack([term.total for term in loss_sum.terms.values()]).sum()
        total.backward()  # type: ignore[no-untyped-call]
        assert float(total.detach()) == 0
        assert all(float(term.total) == 0 == float(term.weight) for term in loss_sum.metrics.values())
        gradients = gradients_of(models.policy)
        assert gradients
        assert not any(bool(gradient.any()) for gradient in gradients.values())


# ---- the step ----------------------------------------------------------------------------------------------


def test_observes_only_where_it_must() -> None:
    policy, samples = PositionPolicy(), pairs_of_lengths((4, 3, 2), (2, 1, 5))
    for name in LOSSES:
        needed = {"label_smoothing": 0.1} if name == "exo_pair" else {}
        stage = build_stage(DpoSpec.model_validate({"loss": name, **needed}), OPTIONS)
        passes = [stage.collate([sample]) for sample in samples]
        policy.asked.clear()
        assert stage.observe(policy, passes[:1]) == {}
        assert policy.asked == []
        statistic = name in ("kto_pair", "bco_pair", "aot", "aot_unpaired")
        observed = stage.observe(policy, passes)
        assert set(observed) == ({field.name for field in fields(Step)} if statistic else set())
        assert policy.asked == (["reference", "policy"] * 2 if statistic else [])
        assert all(value.shape == (2,) for value in observed.values())
    assert not needs_step(DpoSpec(loss="bco_pair", bco_shift="none"))


def as_pairs(chosen: list[float], rejected: list[float], keys: list[int]) -> tuple[Pairs, Tensor]:
    leaf = torch.tensor(chosen, requires_grad=True)
    ones, zeros = torch.ones(len(chosen)), torch.zeros(len(chosen))
    return (
        Pairs(
            Answers(leaf, zeros, ones, -leaf),
            Answers(torch.tensor(rejected), zeros, ones, -torch.tensor(rejected)),
            torch.tensor(keys),
        ),
        leaf,
    )


def test_aot_ranks_are_those_that_were_seen() -> None:
    """Dropout may move live values past each other: every partner is still met once."""
    seen, _ = as_pairs([1.0, 2.0, 3.0], [10.0, 20.0, 30.0], [7, 8, 9])
    live, leaf = as_pairs([3.5, 2.5, 2.4], [10.0, 20.0, 30.0], [7, 8, 9])
    spec = DpoSpec(loss="aot_unpaired", beta=0.1)
    losses = LOSSES["aot_unpaired"](live, Step.of(seen), spec)
    expected = np.log1p(np.exp(-0.1 * (np.array([3.5, 2.5, 2.4]) - np.array([10.0, 20.0, 30.0]))))
    np.testing.assert_allclose(losses.detach().numpy(), expected, rtol=1e-6)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    assert bool((leaf.grad < 0).all())


def test_aot_ties_share_their_partners() -> None:
    """Three equal values and two copies of a pair: whatever the order, the same losses and gradients row by row."""
    spec = DpoSpec(loss="aot_unpaired", beta=0.1)
    rows = [(1.0, 5.0, 1), (1.0, 9.0, 2), (1.0, 1.0, 3), (4.0, 2.0, 4), (4.5, 2.0, 4), (0.0, 7.0, 5)]

    def by_row(order: list[int]) -> tuple[dict[int, float], dict[int, float]]:
        columns = zip(*(rows[i] for i in order), strict=True)
        pairs, leaf = as_pairs(*(list(column) for column in columns))  # type: ignore[arg-type]
        losses = LOSSES["aot_unpaired"](pairs, Step.of(pairs), spec)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        return dict(zip(order, losses.tolist(), strict=True)), dict(
            zip(order, leaf.grad.tolist(), strict=True)
        )

    losses, gradients = by_row([0, 1, 2, 3, 4, 5])
    for order in ([5, 4, 3, 2, 1, 0], [2, 0, 5, 1, 4, 3]):
        again = by_row(order)
        assert again[0] == pytest.approx(losses, rel=1e-6)
        assert again[1] == pytest.approx(gradients, rel=1e-6)

    # Sorted, the worse answers are 1 2 2 5 7 9: the least better answer meets 1, the equal ones 2 2 5 alike, and the
    # copies of one pair, which dropout has moved apart, 7 and 9 alike.
    def met(value: float, others: list[float]) -> float:
        return float(np.mean([np.log1p(np.exp(-0.1 * (value - other))) for other in others]))

    expected = [met(1, [2, 2, 5])] * 3 + [met(4, [7, 9]), met(4.5, [7, 9]), met(0, [1])]
    assert list(losses.values()) == pytest.approx(expected, rel=1e-5)


def test_keys_name_rows_and_not_places() -> None:
    samples = random_pairs(4)
    stage = build_stage(DpoSpec(), OPTIONS)

    def keys(chosen: list[Sample]) -> list[int]:
        batch = stage.collate(chosen)
        assert batch.rows is not None
        return row_keys(batch, batch.rows.chunk(2)[0]).tolist()

    together = keys(samples)
    assert len(set(together)) == 4
    assert keys(samples[::-1]) == together[::-1]
    assert [keys([sample])[0] for sample in samples] == together


def test_tokens_know_their_rows() -> None:
    for share_prompts in (False, True):
        stage = build_stage(DpoSpec(), OPTIONS, share_prompts=share_prompts)
        batch = stage.collate(pairs_of_lengths((4, 3, 2), (1, 1, 5)))
        assert token_rows(batch).tolist() == [0] * 3 + [1] + [2] * 2 + [3] * 5
        assert bool((batch.parent >= 0).any()) == share_prompts == stage.share_prompts


def test_answers_without_tokens() -> None:
    """An answer that was cut to nothing has the probability 1, and nothing becomes a NaN."""
    sample = made_sample([[5, 6], [7], []], 0)
    for loss in ("ipo", "orpo", "simpo", "sigmoid_norm"):
        stage = build_stage(DpoSpec.model_validate({"loss": loss, "sft_weight": 0.1}), OPTIONS)
        models = made_models()
        loss_sum = stage.loss(models.handle(), stage.collate([sample]), {})
        torch.stack([term.total for term in loss_sum.terms.values()]).sum().backward()  # type: ignore[no-untyped-call]
        assert float(loss_sum.metrics["logps/rejected"].total) == 0
        assert all(bool(gradient.isfinite().all()) for gradient in gradients_of(models.policy).values())


# ---- the recipe --------------------------------------------------------------------------------------------

REFUSED = [
    ({"loss": "hinge", "label_smoothing": 0.1}, "label_smoothing"),
    ({"loss": "robust", "label_smoothing": 0.5}, "below 0.5"),
    ({"loss": "exo_pair"}, "label_smoothing"),
    ({"loss": "aot", "divergence": "js"}, "divergence"),
    ({"loss": "simpo", "reference": "base"}, "reference"),
    ({"loss": "sigmoid", "gamma": 1.0}, "gamma belongs to loss: simpo"),
    ({"loss": "sigmoid", "discopop_tau": 0.1}, "discopop_tau belongs to loss: discopop"),
    ({"loss": "sigmoid", "bco_shift": "none"}, "bco_shift belongs to loss: bco_pair"),
    ({"loss": "sigmoid", "divergence_alpha": 0.1}, "divergence_alpha belongs to divergence: alpha"),
    ({"loss": "sigmoid", "divergence": "alpha", "divergence_alpha": 1.5}, "divergence_alpha"),
    ({"loss": {}}, "empty"),
    ({"loss": {"sigmoid": 0}}, "greater than 0"),
    ({"loss": "dpo"}, "loss"),
    ({"beta": 0}, "beta"),
]


@pytest.mark.parametrize(("spec", "message"), REFUSED)
def test_refused(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DpoSpec.model_validate(spec)


def test_a_written_out_recipe_is_read_again() -> None:
    """Options of other losses at their defaults, as a resolved recipe has them, are no contradiction."""
    for spec in (DpoSpec(), DpoSpec(loss={"simpo": 1.0, "bco_pair": 2.0}, gamma=1.0, bco_shift="none")):
        assert DpoSpec.model_validate(spec.model_dump()) == spec
