"""Every loss of pairs = its paper's formula in float64, and = TRL's on the same model and tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from luthier.recipe.stage import DpoSpec, PairLossName
from luthier.stages import build_stage
from luthier.stages.pair_losses import LOSSES, Answers, Pairs, Step, log1mexp, log_odds_ratio
from luthier.types import Sample
from tests.pair_formulas import FORMULAS, Numbers, Options, slopes, total
from tests.preference import (
    OPTIONS,
    Models,
    gradients_of,
    made_models,
    random_pairs,
    step_loss,
)
from tests.reference import assert_same_gradients
from tests.tiny import chat_tokenizer


@dataclass(frozen=True)
class Case:
    """A loss with options of ours; `trl` are TRL's names for them, None where TRL 1.16 has no such loss."""

    name: str
    spec: dict[str, Any] = field(default_factory=dict)
    trl: dict[str, Any] | None = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.spec.items())])

    def options(self) -> DpoSpec:
        return DpoSpec.model_validate({"loss": self.name, "beta": 0.3, **self.spec})


SMOOTH = ({"label_smoothing": 0.2}, {"label_smoothing": 0.2})
DIVERGENCES = [
    ({"divergence": "forward_kl"}, {"f_divergence_type": "forward_kl"}),
    ({"divergence": "js"}, {"f_divergence_type": "js_divergence"}),
    (
        {"divergence": "alpha", "divergence_alpha": 0.7},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    ),
]
LD = ({"ld_alpha": 0.4}, {"ld_alpha": 0.4})

CASES = [
    Case("sigmoid"),
    Case("sigmoid", {"beta": 2.0}),
    Case("sigmoid", SMOOTH[0], None),
    Case("sigmoid", *LD),
    *(Case("sigmoid", *divergence) for divergence in DIVERGENCES),
    Case("robust"),
    Case("robust", *SMOOTH),
    Case("robust", SMOOTH[0] | DIVERGENCES[1][0], SMOOTH[1] | DIVERGENCES[1][1]),
    Case("hinge"),
    Case("hinge", *DIVERGENCES[0]),
    Case("ipo"),
    Case("ipo", *LD),
    *(Case("ipo", *divergence) for divergence in DIVERGENCES),
    Case("sigmoid_norm"),
    Case("sigmoid_norm", *DIVERGENCES[2]),
    Case("exo_pair", *SMOOTH),
    Case("exo_pair", SMOOTH[0] | DIVERGENCES[1][0], SMOOTH[1] | DIVERGENCES[1][1]),
    Case("discopop"),
    Case("discopop", {"discopop_tau": 0.7}, {"discopop_tau": 0.7}),
    Case("discopop", *DIVERGENCES[1]),
    Case("nca_pair"),
    Case("nca_pair", *LD),
    Case("sppo_hard"),
    Case("apo_zero"),
    Case("apo_down"),
    Case("aot"),
    Case("aot", *SMOOTH),
    Case("aot", *LD),
    Case("aot_unpaired"),
    Case("aot_unpaired", *SMOOTH),
    Case("bco_pair", {"bco_shift": "none"}),
    Case("bco_pair", {}, None),
    Case("kto_pair", {}, None),
    Case("orpo", {}, None),
    Case("simpo", {"gamma": 0.4}, None),
    Case("simpo", SMOOTH[0], None),
    Case("cpo", {}, None),
    Case("cpo", SMOOTH[0], None),
]


def test_every_loss_has_an_oracle() -> None:
    names = set(get_args(PairLossName))
    assert names == set(LOSSES) == set(FORMULAS) == {case.name for case in CASES}
    without_trl = {name for name in names if not any(c.trl is not None for c in CASES if c.name == name)}
    assert without_trl == {"kto_pair", "orpo", "simpo", "cpo"}


# ---- formulas ----------------------------------------------------------------------------------------------


def made_numbers(num: int, seed: int) -> Numbers:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, (2, num)).astype(np.float64)
    policy = -rng.uniform(0.05, 2, (2, num)) * lengths
    reference = policy - rng.normal(0.3, 1.5, (2, num))
    return Numbers(policy[0], policy[1], reference[0], reference[1], lengths[0], lengths[1])


def as_pairs(numbers: Numbers, leaves: dict[str, Tensor]) -> Pairs:
    def answers(side: str) -> Answers:
        reference = torch.tensor(getattr(numbers, f"{side}_ref"), dtype=torch.float32)
        lengths = torch.tensor(getattr(numbers, f"{side}_len"), dtype=torch.float32)
        return Answers(leaves[side], reference, lengths, -leaves[side] / lengths)

    return Pairs(answers("c"), answers("r"), torch.arange(len(numbers.c)))


@pytest.mark.parametrize("case", [case for case in CASES if "ld_alpha" not in case.spec], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_formula(case: Case, seed: int) -> None:
    spec = case.options()
    options = Options(
        beta=spec.beta,
        eps=spec.label_smoothing,
        gamma=spec.gamma,
        tau=spec.discopop_tau,
        divergence=spec.divergence,
        alpha=spec.divergence_alpha,
        shift=spec.bco_shift == "step",
    )
    numbers = made_numbers(7, seed)
    leaves = {
        side: torch.tensor(getattr(numbers, side), dtype=torch.float32, requires_grad=True)
        for side in ("c", "r")
    }
    pairs = as_pairs(numbers, leaves)
    losses = LOSSES[spec.loss](pairs, Step.of(pairs), spec)  # type: ignore[index]
    assert losses.shape == (7,)
    assert losses.dtype == torch.float32
    assert float(losses.sum().detach()) == pytest.approx(
        total(case.name, numbers, numbers, options), rel=2e-5
    )
    losses.sum().backward()  # type: ignore[no-untyped-call]
    for side, expected in zip(("c", "r"), slopes(case.name, numbers, options), strict=True):
        gradient = leaves[side].grad
        actual = np.zeros(7) if gradient is None else gradient.numpy()
        np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-5 * np.abs(expected).max() + 1e-7)


@pytest.mark.parametrize("name", get_args(PairLossName))
@pytest.mark.parametrize("size", [0.0, 40.0, 2000.0])
def test_extremes_stay_numbers(name: str, size: float) -> None:
    """Certain answers, and log-ratios that float32 has no exponential of, in both directions."""
    needed = {"label_smoothing": 0.1} if name == "exo_pair" else {}
    divergences = ["reverse_kl"]
    if name in ("sigmoid", "ipo", "discopop"):
        divergences += ["forward_kl", "js", "alpha"]
    for divergence in divergences:
        spec = DpoSpec.model_validate({"loss": name, "beta": 1.0, "divergence": divergence, **needed})
        chosen = torch.tensor([0.0, -size, 0.0, -size], requires_grad=True)
        rejected = torch.tensor([0.0, 0.0, -size, -size], requires_grad=True)
        zeros, ones = torch.zeros(4), torch.ones(4)
        pairs = Pairs(
            Answers(chosen, zeros, ones, -chosen), Answers(rejected, zeros, ones, -rejected), torch.arange(4)
        )
        losses = LOSSES[name](pairs, Step.of(pairs), spec)  # type: ignore[index]
        losses.sum().backward()  # type: ignore[no-untyped-call]
        gradients = [leaf.grad for leaf in (chosen, rejected) if leaf.grad is not None]
        assert not any(bool(value.isnan().any()) for value in (losses, *gradients))
        if name != "discopop" and divergence != "alpha" and divergence != "forward_kl":
            assert all(bool(value.isfinite().all()) for value in (losses, *gradients))


def test_log1mexp_near_both_ends() -> None:
    x = -torch.logspace(-6, 1.5, 40, dtype=torch.float64)
    expected = torch.log(-torch.expm1(x))
    torch.testing.assert_close(log1mexp(x.float()).double(), expected, rtol=1e-5, atol=1e-7)


# ---- the losses that TRL keeps apart -----------------------------------------------------------------------


def odds(numbers: Numbers) -> tuple[Pairs, Any]:
    leaves = {side: torch.tensor(getattr(numbers, side), dtype=torch.float32) for side in ("c", "r")}
    return as_pairs(numbers, leaves), SimpleNamespace(device="cpu")


def test_orpo_is_trl_s_odds_ratio_loss() -> None:
    pairs, accelerator = odds(made_numbers(9, 3))
    trainer = SimpleNamespace(beta=0.3, accelerator=accelerator)
    theirs, _, _, _, log_odds = ORPOTrainer.odds_ratio_loss(
        trainer, pairs.chosen.mean_logprob, pairs.rejected.mean_logprob
    )
    spec = DpoSpec(loss="orpo", beta=0.3)
    ours = LOSSES["orpo"](pairs, Step.of(pairs), spec)
    torch.testing.assert_close(ours, pairs.chosen.nll - theirs, rtol=1e-5, atol=1e-6)
    assert float(log_odds_ratio(pairs).mean()) == pytest.approx(float(log_odds), rel=1e-5)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_simpo_and_cpo_are_trl_s(label_smoothing: float) -> None:
    pairs, accelerator = odds(made_numbers(9, 3))
    common = {"alpha": 0.0, "beta": 0.3, "label_smoothing": label_smoothing, "accelerator": accelerator}
    chosen, rejected = pairs.chosen, pairs.rejected
    trainer = SimpleNamespace(loss_type="simpo", simpo_gamma=0.7, **common)
    theirs, _, _ = CPOTrainer.cpo_loss(trainer, chosen.mean_logprob, rejected.mean_logprob)
    spec = DpoSpec(loss="simpo", beta=0.3, gamma=0.7, label_smoothing=label_smoothing)
    torch.testing.assert_close(LOSSES["simpo"](pairs, Step.of(pairs), spec), theirs, rtol=1e-5, atol=1e-6)
    trainer = SimpleNamespace(loss_type="sigmoid", **common)
    theirs, _, _ = CPOTrainer.cpo_loss(trainer, chosen.logprobs, rejected.logprobs)
    spec = DpoSpec(loss="cpo", beta=0.3, label_smoothing=label_smoothing)
    ours = LOSSES["cpo"](pairs, Step.of(pairs), spec) - chosen.nll
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# ---- TRL's trainer -----------------------------------------------------------------------------------------


def dpo_trainer(policy: Any, reference: Any, tokenizer: Any, folder: Path) -> DPOTrainer:
    """TRL's trainer of these models; `_compute_loss` takes whatever its attributes say at the moment."""
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    args = DPOConfig(
        str(folder),
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        disable_tqdm=True,
    )
    return DPOTrainer(
        policy, reference, args, train_dataset=Dataset.from_list([row]), processing_class=tokenizer
    )


def trl_loss(trainer: DPOTrainer, samples: list[Sample], options: dict[str, Any]) -> Tensor:
    defaults = {
        "beta": 0.3,
        "label_smoothing": 0.0,
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "loss_weights": [1.0] * len(options["loss_types"]),
    }
    for name, value in (defaults | options).items():
        setattr(trainer.args if name == "discopop_tau" else trainer, name, value)
    examples = []
    for sample in samples:
        first, second = sample.branches
        ids = sample.input_ids.tolist()
        examples.append(
            {"prompt_ids": ids[:first], "chosen_ids": ids[first:second], "rejected_ids": ids[second:]}
        )
    batch = DataCollatorForPreference(pad_token_id=0)(examples)
    return trainer._compute_loss(trainer.model, dict(batch), False)


@pytest.fixture(scope="module")
def models() -> Models:
    return made_models()


@pytest.fixture(scope="module")
def trainer(models: Models, tmp_path_factory: pytest.TempPathFactory) -> DPOTrainer:
    trl = dpo_trainer(
        models.plain_policy, models.plain_reference, chat_tokenizer(), tmp_path_factory.mktemp("trl")
    )
    trl.args.discopop_tau = 0.05
    return trl


def assert_same_as_trl(models: Models, trainer: DPOTrainer, spec: DpoSpec, options: dict[str, Any]) -> None:
    samples = random_pairs(5)
    trainer.args.discopop_tau = 0.05
    theirs = trl_loss(trainer, samples, options)
    theirs.backward()
    stage = build_stage(spec, OPTIONS)
    ours = step_loss(stage, models.handle(), [stage.collate(samples)])
    assert float(ours) == pytest.approx(float(theirs.detach()), rel=1e-5)
    assert_same_gradients(gradients_of(models.policy), gradients_of(models.plain_policy), relative=3e-5)


@pytest.mark.parametrize("case", [case for case in CASES if case.trl is not None], ids=str)
def test_trl(case: Case, models: Models, trainer: DPOTrainer) -> None:
    assert case.trl is not None
    spec = case.options()
    options = {"loss_types": [case.name], "beta": spec.beta, **case.trl}
    assert_same_as_trl(models, trainer, spec, options)


def test_trl_weighted_sum(models: Models, trainer: DPOTrainer) -> None:
    weights = {"sigmoid": 0.8, "apo_zero": 1.5, "ipo": 0.2}
    spec = DpoSpec.model_validate({"loss": weights, "beta": 0.3})
    options = {"loss_types": list(weights), "loss_weights": list(weights.values())}
    assert_same_as_trl(models, trainer, spec, options)


def test_trl_metrics(models: Models, trainer: DPOTrainer) -> None:
    """The logged numbers under the field's names."""
    samples = random_pairs(5)
    trainer._metrics["train"].clear()
    trl_loss(trainer, samples, {"loss_types": ["sigmoid"]})
    stage = build_stage(DpoSpec(beta=0.3), OPTIONS)
    batch = stage.collate(samples)
    metrics = stage.loss(models.handle(), batch, {}).metrics
    assert set(metrics) == {
        *(f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")),
        *("logps/chosen", "logps/rejected"),
    }
    for name, term in metrics.items():
        (expected,) = trainer._metrics["train"][name]
        assert float(term.total / term.weight) == pytest.approx(expected, rel=1e-4, abs=1e-6)
