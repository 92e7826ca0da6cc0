"""Claims about the loss of a step: what it is, by its formula and ordinary forward passes, and that nothing depends on
how the step is cut into passes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from luthier.arrange import training_steps
from luthier.data.collate import rows_of
from luthier.material import fitted
from luthier.model.logprobs import chosen_rows
from luthier.recipe.schema import DpoSpec, KtoSpec, OnlineSpec, PtSpec, RmSpec, SftSpec
from luthier.selfcheck.bench import Bench, relative_difference
from luthier.selfcheck.model_checks import alone_numbers
from luthier.selfcheck.outcome import Outcome, left_out
from luthier.trainer.arguments import training_arguments
from luthier.trainer.plugins import load_schedule
from luthier.trainer.trainer import PeftTrainer
from luthier.types import Sample

_NEEDS_A_ROLLOUT = "a step of this stage learns from a rollout and its rewards, which these rows are not"


def accumulation(bench: Bench) -> Outcome:
    """The gradient of a step does not depend on how it is cut into passes: all at once, or row by row."""
    claim = "1 pass = many passes"
    if isinstance(bench.settings.stage, OnlineSpec):
        return left_out("accumulation", claim, _NEEDS_A_ROLLOUT)
    trainer = trainer_of(bench)
    collate = bench.stage.collate
    cuts = {"one pass": [collate(bench.samples)], "row by row": [collate([one]) for one in bench.samples]}
    found, losses = {}, {}
    for name, batches in cuts.items():
        losses[name] = float(trainer.training_step(bench.model, batches))
        found[name] = bench.gradients()
    bench.model.eval()
    measured = relative_difference(found["row by row"], found["one pass"])
    apart = abs(losses["row by row"] - losses["one pass"]) / max(abs(losses["one pass"]), 1e-12)
    detail = f"{len(bench.samples)} passes against 1: losses {losses['row by row']:.8g} and {losses['one pass']:.8g}"
    return Outcome("accumulation", claim, max(measured, apart), bench.gradient_bound, "of its norm", detail)


def mean(bench: Bench) -> Outcome:
    """The loss of a step is what its formula says, by ordinary forward passes of every row alone.

    For likelihoods that is the weighted mean over the targets; for preferences it is a mean over pairs or rows.
    """
    claim, reason = _claim(bench), _unknown(bench)
    if reason:
        return left_out("mean", claim, reason)
    trainer = trainer_of(bench)
    batches = [bench.stage.collate([one]) for one in bench.samples]
    found = float(trainer.training_step(bench.model, batches))
    bench.gradients()
    bench.model.eval()
    with torch.no_grad():
        expected = float(_expected(bench))
    detail = f"{found:.8g} against {expected:.8g}"
    unit = "nats" if bench.stage.is_likelihood else ""
    return Outcome("mean", claim, abs(found - expected), bench.bound, unit, detail)


def _claim(bench: Bench) -> str:
    return "loss = mean over targets" if bench.stage.is_likelihood else "loss = its formula"


def _unknown(bench: Bench) -> str:
    """Why there is no formula for this loss here; "" where there is one."""
    spec = bench.settings.stage
    if isinstance(spec, OnlineSpec):
        return _NEEDS_A_ROLLOUT
    if isinstance(spec, PtSpec | SftSpec) and spec.label_smoothing:
        return "not with label smoothing"
    if isinstance(spec, SftSpec) and spec.loss != "cross_entropy":
        return f"loss {spec.loss} is no mean of log-probabilities"
    if isinstance(spec, DpoSpec):
        plain = spec.divergence == "reverse_kl" and spec.ld_alpha is None and not spec.sft_weight
        if list(spec.losses) != ["sigmoid"] or not plain:
            return "measured for loss sigmoid alone, without divergence, ld_alpha and sft_weight"
    if isinstance(spec, KtoSpec) and (spec.loss != "kto" or spec.sft_weight):
        return "measured for loss kto alone, without sft_weight"
    return ""


def _expected(bench: Bench) -> Tensor:
    """The loss of a step of all samples of the bench."""
    spec = bench.settings.stage
    if isinstance(spec, RmSpec):
        return _bradley_terry(bench, spec)
    if isinstance(spec, DpoSpec):
        return _dpo(bench, spec)
    if isinstance(spec, KtoSpec):
        return _kto(bench, spec)
    weights = [torch.from_numpy(row.weights[1:][row.weights[1:] > 0]).double() for row in bench.sequences]
    sums = [
        (alone_numbers(bench, row).cpu() * weight).sum()
        for row, weight in zip(bench.sequences, weights, strict=True)
    ]
    total: Tensor = -torch.stack(sums).sum() / torch.cat(weights).sum()
    return total


def _bradley_terry(bench: Bench, spec: RmSpec) -> Tensor:
    """-log sigmoid(r_c - r_r - m) + center (r_c + r_r)^2."""
    chosen, rejected = torch.tensor(
        [[float(alone_numbers(bench, row)) for row in rows_of(sample)] for sample in bench.samples],
        dtype=torch.float64,
    ).T
    labels = torch.tensor([sample.label for sample in bench.samples], dtype=torch.float64)
    margins = torch.where(labels.isnan(), spec.margin, labels)
    losses: Tensor = -logsigmoid(chosen - rejected - margins) + spec.center * (chosen + rejected).square()
    return losses.mean()


def _dpo(bench: Bench, spec: DpoSpec) -> Tensor:
    """-(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d), where d is the difference of both log-ratios."""
    chosen, rejected = _log_ratios(bench, bench.samples).T
    margins, noise = spec.beta * (chosen - rejected), spec.label_smoothing
    losses: Tensor = -(1 - noise) * logsigmoid(margins) - noise * logsigmoid(-margins)
    return next(iter(spec.losses.values())) * losses.mean()


def _kto(bench: Bench, spec: KtoSpec) -> Tensor:
    """w (1 - sigmoid(beta (u - z))) of a desirable answer, w (1 - sigmoid(beta (z - u))) of another."""
    ratios, others = _log_ratios(bench, bench.samples).T
    desirable = torch.tensor([sample.label > 0 for sample in bench.samples])
    values = spec.beta * (ratios - others.mean().clamp(min=0))
    gained = spec.desirable_weight * (1 - values.sigmoid())
    lost = spec.undesirable_weight * (1 - (-values).sigmoid())
    return torch.where(desirable, gained, lost).mean()


def _log_ratios(bench: Bench, samples: Sequence[Sample]) -> Tensor:
    """(n, 2) float64 weighted log-ratios of both answers of each sample to the reference."""
    reference = bench.reference
    assert reference is not None
    ratios = []
    for sample in samples:
        for row in rows_of(sample):
            weights = torch.from_numpy(row.weights[1:][row.weights[1:] > 0]).double()
            own = alone_numbers(bench, row).cpu()
            with reference.active(bench.model) as frozen:
                other = alone_numbers(bench, row, frozen).cpu()
            ratios.append((weights * (own - other)).sum())
    return torch.stack(ratios).reshape(len(samples), 2)


def trainer_of(bench: Bench) -> PeftTrainer:
    """The training loop of this recipe around the model, without noise: nothing random may differ."""
    recipe = bench.settings
    quiet = recipe.train.model_copy(
        update={"output": str(bench.folder / "loop"), "report_to": (), "neftune_alpha": 0.0, "callbacks": ()}
    )
    recipe = recipe.model_copy(update={"train": quiet})
    material = fitted(recipe, bench.material, bench.model)
    return PeftTrainer(
        model=bench.model,
        args=training_arguments(recipe, use_cpu=bench.hardware.device == "cpu"),
        stage=material.stage,
        method=bench.method,
        optim=recipe.optim,
        steps=training_steps(recipe, material, 1, 0, padded=chosen_rows(bench.model).padded),
        eval_sets={},
        tokenizer=material.template.tokenizer,
        callbacks=[],
        reference=bench.reference,
        schedule=load_schedule(recipe.optim.schedule_function, bench.beside),
    )
