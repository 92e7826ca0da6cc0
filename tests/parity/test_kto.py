"""KTO and APO-zero on single answers = their formulas in float64, and = TRL's on the same model and tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trl import KTOConfig, KTOTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from luthier.recipe.stage import KtoSpec
from luthier.stages import build_stage
from luthier.types import Batch, Sample, TokenLogprobs
from tests.preference import (
    OPTIONS,
    Models,
    gradients_of,
    made_models,
    made_sample,
    random_answers,
    step_loss,
)
from tests.reference import assert_same_gradients
from tests.tiny import chat_tokenizer

LABELS = {
    "both": [True, False, False, True, True],
    "one label": [True, True, True],
    "the other": [False, False],
    "one row": [False],
}


# ---- TRL ---------------------------------------------------------------------------------------------------


def kto_trainer(policy: Any, reference: Any, tokenizer: Any, folder: Path, loss: str) -> KTOTrainer:
    """TRL's trainer of these models."""
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in (True, False)]
    args = KTOConfig(
        str(folder),
        loss_type=loss,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        disable_tqdm=True,
    )
    return KTOTrainer(
        policy, reference, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )


def trl_batch(samples: list[Sample]) -> dict[str, Tensor]:
    """The samples, each with a second branch to estimate the divergence by, as TRL collates them."""
    examples = []
    for sample in samples:
        ids, (first, second) = sample.input_ids.tolist(), sample.branches
        examples.append(
            {
                "prompt_ids": ids[:first],
                "completion_ids": ids[first:second],
                "KL_completion_ids": ids[second:],
                "label": sample.label > 0,
            }
        )
    return dict(DataCollatorForUnpairedPreference(pad_token_id=0)(examples))


@pytest.fixture(scope="module")
def models() -> Models:
    return made_models()


@pytest.fixture(scope="module")
def trainers(models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, KTOTrainer]:
    return {
        loss: kto_trainer(
            models.plain_policy,
            models.plain_reference,
            chat_tokenizer(),
            tmp_path_factory.mktemp("trl"),
            loss,
        )
        for loss in ("kto", "apo_zero_unpaired")
    }


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 1.6)])
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_trl(
    loss: Literal["kto", "apo_zero_unpaired"],
    labels: str,
    weights: tuple[float, float],
    models: Models,
    trainers: dict[str, KTOTrainer],
) -> None:
    samples, trainer = random_answers(LABELS[labels], seed=2), trainers[loss]
    trainer.beta, trainer.desirable_weight, trainer.undesirable_weight = 0.3, *weights
    trainer._metrics["train"].clear()
    theirs = trainer._compute_loss(trainer.model, trl_batch(samples), False)
    theirs.backward()
    spec = KtoSpec(loss=loss, beta=0.3, desirable_weight=weights[0], undesirable_weight=weights[1])
    stage, policy = build_stage(spec, OPTIONS), models.handle()
    if loss == "apo_zero_unpaired":  # its samples come without the answers of others
        samples = [without_partner(sample) for sample in samples]
    batch = stage.collate(samples)
    ours = step_loss(stage, policy, [batch])
    assert float(ours) == pytest.approx(float(theirs.detach()), rel=1e-5)
    assert_same_gradients(gradients_of(models.policy), gradients_of(models.plain_policy))
    metrics = stage.loss(policy, batch, stage.observe(policy, [batch])).metrics
    logged = trainer._metrics["train"]
    for name, term in metrics.items():
        if float(term.weight):
            assert float(term.total / term.weight) == pytest.approx(logged[name][0], rel=1e-4, abs=2e-5)
        else:
            assert name not in logged
    names = {f"{what}/{half}" for what in ("rewards", "logps") for half in ("chosen", "rejected")}
    assert set(metrics) == names | ({"kl"} if loss == "kto" else set())


def without_partner(sample: Sample) -> Sample:
    first, second = sample.branches
    ids = sample.input_ids.tolist()
    return made_sample([ids[:first], ids[first:second]], sample.index, sample.label)


def test_the_divergence_counts(models: Models, trainers: dict[str, KTOTrainer]) -> None:
    """Among the batches above there are some where z is above 0, and some where it is clamped."""
    policy, kinds = models.handle(), set()
    stage = build_stage(KtoSpec(), OPTIONS)
    for labels in LABELS.values():
        batch = stage.collate(random_answers(labels, seed=2))
        with torch.no_grad():
            observed = stage.observe(policy, [batch])
        kinds.add(float(observed["mismatched"].mean()) > 0)
    assert kinds == {True, False}


# ---- formulas ----------------------------------------------------------------------------------------------


class TableOfLogprobs:
    """A policy that says of answer tokens what a table says, by token id."""

    def __init__(self, policy: Tensor, reference: Tensor) -> None:
        self.policy, self.reference = policy, reference

    def logprobs(self, batch: Batch, *, entropy: bool = False, mean_logprobs: bool = False) -> TokenLogprobs:
        return TokenLogprobs(self.policy[batch.targets[batch.targets >= 0]])

    def reference_logprobs(self, batch: Batch) -> Tensor:
        return self.reference[batch.targets[batch.targets >= 0]]

    def scores(self, batch: Batch) -> Tensor:
        raise AssertionError("kto asks for no scores")


@pytest.mark.parametrize("shift", [-1.0, 1.0], ids=["clamped", "positive"])
@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_formula(loss: Literal["kto", "apo_zero_unpaired"], shift: float) -> None:
    """Equations 7 and 8 of arXiv:2402.01306 in float64, with weights and the term of the likelihood."""
    rng = np.random.default_rng(5)
    policy = -rng.uniform(0.1, 2, 97)
    reference = policy - rng.normal(shift, 0.5, 97)
    samples = random_answers([True, False, True, True, False], seed=4)
    spec = KtoSpec(loss=loss, beta=0.4, desirable_weight=0.7, undesirable_weight=1.6, sft_weight=0.3)

    def expected(table: np.ndarray[Any, Any], fixed: np.ndarray[Any, Any]) -> float:
        own, other, rows, likelihood = [], [], 0.0, []
        for sample in samples:
            first, second = sample.branches
            answer, stranger = sample.input_ids[first:second], sample.input_ids[second:]
            own.append(table[answer].sum() - reference[answer].sum())
            other.append(fixed[stranger].sum() - reference[stranger].sum())
            if sample.label:
                likelihood.append(-table[answer].mean())
        z = max(np.mean(other), 0.0) if loss == "kto" else 0.0
        assert loss != "kto" or (z > 0) == (shift > 0)
        for u, sample in zip(own, samples, strict=True):
            value = 1 / (1 + np.exp(-0.4 * ((u - z) if sample.label else (z - u))))
            rows += (0.7 if sample.label else 1.6) * (1 - value)
        return float(rows / len(samples) + 0.3 * np.mean(likelihood))

    leaf = torch.tensor(policy, dtype=torch.float32, requires_grad=True)
    table = TableOfLogprobs(leaf, torch.tensor(reference, dtype=torch.float32))
    stage = build_stage(spec, OPTIONS)
    batch = stage.collate(samples)
    with torch.no_grad():
        observed = stage.observe(table, [batch])
    terms = stage.loss(table, batch, observed).terms
    assert tuple(terms) == stage.terms == ("preference", "sft")
    assert float(terms["sft"].weight) == 3
    total = torch.stack([term.total / term.weight for term in terms.values()]).sum()
    assert float(total.detach()) == pytest.approx(expected(policy, policy), rel=1e-5)
    total.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    for token in range(97):
        ends = [policy + sign * 1e-5 * (np.arange(97) == token) for sign in (1, -1)]
        slope = (expected(ends[0], policy) - expected(ends[1], policy)) / 2e-5
        assert float(leaf.grad[token]) == pytest.approx(slope, rel=1e-3, abs=1e-6)
