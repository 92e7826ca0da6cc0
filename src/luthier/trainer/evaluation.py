"""Evaluation by exact sums: every target counts once, whatever the passes and processes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, overload

import torch
from torch import nn
from transformers import Seq2SeqTrainer

from luthier.model.logprobs import ModelPolicy
from luthier.model.reference import Reference
from luthier.trainer.ledger import add_terms
from luthier.trainer.metrics import Metric, RecordingPolicy, joined, measure
from luthier.trainer.processes import ALONE, Processes
from luthier.trainer.steps import Passes, idle
from luthier.types import Batch, EvalRow, Observed, Policy, RecipeError, Sample, Stage, Term

Answers = Callable[[str], Mapping[str, float]]
"""Answers the evaluation sets with the model as it is; the numbers of the answers, their names after a prefix."""


@dataclass(frozen=True, slots=True)
class EvalSet:
    """Samples to evaluate on and how they are cut into passes, for each process."""

    samples: Sequence[Sample]
    passes: Sequence[Passes]


class _Batches(Sequence[Batch]):
    """The passes of an evaluation set, collated when they are read."""

    def __init__(self, eval_set: EvalSet, passes: Passes, stage: Stage, device: torch.device) -> None:
        self._eval_set, self._passes, self._stage, self._device = eval_set, passes, stage, device

    def __len__(self) -> int:
        return len(self._passes)

    @overload
    def __getitem__(self, i: int) -> Batch: ...
    @overload
    def __getitem__(self, i: slice) -> list[Batch]: ...
    def __getitem__(self, i: int | slice) -> Batch | list[Batch]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        samples = [self._eval_set.samples[index] for index in self._passes[i]]
        return self._stage.collate(samples or [idle(self._eval_set.samples)]).to(self._device)


def observe(
    stage: Stage, policy: Policy, passes: Sequence[Batch], model: nn.Module, processes: Processes = ALONE
) -> Observed:
    """`Stage.observe` of a whole step, of which `passes` are those of this process: without gradients and without
    dropout, whose draws are not used up."""
    with torch.no_grad(), without_dropout(model):
        own = stage.observe(policy, passes, alone=processes.count == 1)
    if processes.count == 1:
        return own
    parts = processes.exchange({name: tensor.cpu() for name, tensor in own.items()})
    return {name: torch.cat([part[name] for part in parts]).to(tensor) for name, tensor in own.items()}


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """The model as it evaluates, whatever mode it is in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class Evaluation(Seq2SeqTrainer):
    """The evaluating half of the trainer."""

    stage: Stage
    _eval_sets: dict[str, EvalSet]
    _metrics: tuple[Metric, ...]
    _eval_arithmetic: torch.dtype | None
    _reference: Reference | None
    _answers: Answers | None
    _with_rows: Processes
    """The processes, as they share rows."""
    _evaluated: tuple[int, dict[str, float]] | None = None
    """The last evaluation and the step after which it was."""

    def evaluate_at_end(self) -> dict[str, float]:
        """The numbers of what was trained: those of the last step's evaluation where there was one."""
        if self._evaluated is not None and not self.args.load_best_model_at_end:
            step, metrics = self._evaluated
            if step == self.state.global_step:
                return dict(metrics)
        return self.evaluate()

    def evaluate(  # type: ignore[override]
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Loss and perplexity of every evaluation set by exact sums, and the recipe's metrics of its rows and answers.

        One set gives `eval_loss`; several give `eval_<name>_loss` each, and `eval_loss` of all their tokens; so with
        metrics. Raises RecipeError where, in training, `best_metric` is not among the numbers.
        """
        self.to_evaluated_weights()
        processes, num_tokens = self._with_rows, 0.0
        started, pooled, metrics = time.time(), dict[str, Term](), dict[str, float]()
        named, rows = len(self._eval_sets) > 1, list[EvalRow]()
        for name, eval_set in self._eval_sets.items():
            sums, tokens, evaluated = self._evaluate_set(eval_set)
            num_tokens += tokens
            rows += evaluated
            add_terms(pooled, sums)
            if named:
                metrics = joined(metrics, self._report(f"{metric_key_prefix}_{name}", sums, evaluated))
        metrics = joined(metrics, self._report(metric_key_prefix, pooled, rows))
        if self._answers is not None:
            with self.compute_loss_context_manager():
                metrics = joined(metrics, self._answers(metric_key_prefix))
        seconds = time.time() - started
        speed = {"runtime": round(seconds, 4)}
        if self._eval_sets:
            (num_tokens,) = processes.total([num_tokens])
            speed["tokens_per_second"] = round(num_tokens / seconds, 3)
        metrics = joined(metrics, {f"{metric_key_prefix}_{name}": value for name, value in speed.items()})
        metrics = processes.exchange(metrics)[0]  # what is decided by them is decided alike, to the last bit
        self.log(metrics)
        self._evaluated = (self.state.global_step, metrics)
        if self.is_in_train:
            self._check_best_metric(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def to_evaluated_weights(self) -> None:
        """Schedule-free optimizers train at another point than they evaluate and save; a step goes back there."""
        if callable(average := getattr(self.optimizer, "eval", None)):
            average()

    def _check_best_metric(self, metrics: Mapping[str, float]) -> None:
        wanted = str(self.args.metric_for_best_model)
        if f"eval_{wanted.removeprefix('eval_')}" not in metrics:
            numbers = ", ".join(name for name in metrics if name.startswith("eval_"))
            raise RecipeError(
                f"train.best_metric={wanted}: the evaluation does not report it; it reports {numbers}"
            )

    @torch.no_grad()
    def _evaluate_set(self, eval_set: EvalSet) -> tuple[dict[str, Term], int, list[EvalRow]]:
        """Sums and tokens of this process, and, where a metric asks for them, the rows of all, in their order."""
        model = self.model_wrapped
        training = model.training
        model.eval()
        plain = ModelPolicy(model, self._eval_arithmetic, reference=self._reference)
        recording = RecordingPolicy(plain) if self._metrics else None
        policy, sums, tokens, ends = recording or plain, dict[str, Term](), 0, list[int]()
        passes = eval_set.passes[self._with_rows.rank]
        self.callback_handler.eval_dataloader = passes
        try:
            batches = _Batches(eval_set, passes, self.stage, self.args.device)
            with self.compute_loss_context_manager():
                observed = observe(self.stage, plain, batches, model, self._with_rows)
            for batch in batches:
                with self.compute_loss_context_manager():
                    loss_sum = self.stage.loss(policy, batch, observed)
                add_terms(sums, loss_sum.terms)
                add_terms(sums, loss_sum.metrics)
                tokens += batch.num_tokens
                ends.append(len(recording.rows) if recording is not None else 0)
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        finally:
            model.train(training)
        if recording is None:
            return sums, tokens, []
        processes, bounds = self._with_rows, [0, *ends]
        own = [recording.rows[start:end] for start, end in pairwise(bounds)]
        return sums, tokens, [row for rows in processes.joined(own) for row in rows]

    def _report(self, prefix: str, sums: Mapping[str, Term], rows: Sequence[EvalRow]) -> dict[str, float]:
        means = self._means(sums)
        terms = [name for name in means if name in self.stage.terms]
        if len(terms) > 1:
            whole = sum(means[name] for name in terms if not math.isnan(means[name]))
            means = {"loss": whole, **{_term_name(name, terms): value for name, value in means.items()}}
        report = {f"{prefix}_{name}": value for name, value in means.items()}
        if self.stage.is_likelihood and "loss" in means:
            nll = means.get("nll", means["loss"])
            report[f"{prefix}_perplexity"] = math.exp(nll) if nll < 700 else math.inf
        if not rows:
            return report
        measured = Processes.of(self.args).first(partial(measure, self._metrics, rows, prefix))
        return joined(report, measured)

    def _means(self, sums: Mapping[str, Term]) -> dict[str, float]:
        """The mean of each sum; a metric that no row counts for has none, as rewards of desirable answers may."""
        whole = self._with_rows.sums(
            {name: (float(term.total), float(term.weight)) for name, term in sums.items()}
        )
        means = {name: total / weight if weight else math.nan for name, (total, weight) in whole.items()}
        terms = self.stage.terms
        counted = {name: mean for name, mean in means.items() if name in terms or whole[name][1] > 0}
        return counted | self.stage.derived(counted)


def _term_name(name: str, terms: Sequence[str]) -> str:
    return f"{name}_loss" if name in terms else name
