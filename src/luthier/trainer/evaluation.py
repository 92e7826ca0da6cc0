"""Evaluation by exact sums: every target counts once, whatever the passes and processes."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Seq2SeqTrainer

from luthier.model.logprobs import ModelPolicy
from luthier.trainer.ledger import add_terms
from luthier.trainer.metrics import Metric, RecordingPolicy, joined, measure
from luthier.trainer.steps import Passes
from luthier.types import EvalRow, RecipeError, Sample, Stage, Term


@dataclass(frozen=True, slots=True)
class EvalSet:
    """Samples to evaluate on and how they are cut into passes, for each process."""

    samples: Sequence[Sample]
    passes: Sequence[Passes]


class Evaluation(Seq2SeqTrainer):
    """The evaluating half of the trainer."""

    stage: Stage
    _eval_sets: dict[str, EvalSet]
    _metrics: tuple[Metric, ...]
    _eval_arithmetic: torch.dtype | None

    def evaluate(  # type: ignore[override]
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Loss and perplexity of every evaluation set by exact sums, and the recipe's metrics of its rows.

        One set gives `eval_loss`; several give `eval_<name>_loss` each, and `eval_loss` of all their tokens; so with
        metrics. Raises RecipeError where, in training, `best_metric` is not among the numbers.
        """
        started, pooled, metrics, num_tokens = time.time(), dict[str, Term](), dict[str, float](), 0
        named, rows = len(self._eval_sets) > 1, list[EvalRow]()
        for name, eval_set in self._eval_sets.items():
            sums, tokens, evaluated = self._evaluate_set(eval_set)
            num_tokens += tokens
            rows += evaluated
            add_terms(pooled, sums)
            if named:
                metrics = joined(metrics, self._report(f"{metric_key_prefix}_{name}", sums, evaluated))
        metrics = joined(metrics, self._report(metric_key_prefix, pooled, rows))
        seconds = time.time() - started
        speed = {"runtime": round(seconds, 4), "tokens_per_second": round(num_tokens / seconds, 3)}
        metrics = joined(metrics, {f"{metric_key_prefix}_{name}": value for name, value in speed.items()})
        self.log(metrics)
        if self.is_in_train:
            self._check_best_metric(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _check_best_metric(self, metrics: Mapping[str, float]) -> None:
        wanted = str(self.args.metric_for_best_model)
        if f"eval_{wanted.removeprefix('eval_')}" not in metrics:
            numbers = ", ".join(name for name in metrics if name.startswith("eval_"))
            raise RecipeError(
                f"train.best_metric={wanted}: the evaluation does not report it; it reports {numbers}"
            )

    @torch.no_grad()
    def _evaluate_set(self, eval_set: EvalSet) -> tuple[dict[str, Term], int, list[EvalRow]]:
        """Sums, tokens, and, where a metric asks for them, the rows of this process."""
        model = self.model_wrapped
        training = model.training
        model.eval()
        plain = ModelPolicy(model, self._eval_arithmetic)
        recording = RecordingPolicy(plain) if self._metrics else None
        policy, sums, tokens = recording or plain, dict[str, Term](), 0
        passes = eval_set.passes[self.args.process_index]
        self.callback_handler.eval_dataloader = passes
        try:
            for indices in passes:
                batch = self.stage.collate([eval_set.samples[index] for index in indices]).to(
                    self.args.device
                )
                with self.compute_loss_context_manager():
                    loss_sum = self.stage.loss(policy, batch)
                add_terms(sums, loss_sum.terms)
                add_terms(sums, loss_sum.metrics)
                tokens += batch.num_tokens
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        finally:
            model.train(training)
        return sums, tokens, recording.rows if recording is not None else []

    def _report(self, prefix: str, sums: Mapping[str, Term], rows: Sequence[EvalRow]) -> dict[str, float]:
        means = {name: self._mean(term) for name, term in sums.items()}
        report = {f"{prefix}_{name}": value for name, value in means.items()}
        if "loss" in means:
            nll = means.get("nll", means["loss"])
            report[f"{prefix}_perplexity"] = math.exp(nll) if nll < 700 else math.inf
        return joined(report, measure(self._metrics, rows, prefix)) if rows else report

    def _mean(self, term: Term) -> float:
        total, weight = term.total, term.weight
        if self.args.world_size > 1:
            total, weight = (self.accelerator.reduce(value, "sum") for value in (total, weight))
        return float(total / weight) if float(weight) else math.nan
