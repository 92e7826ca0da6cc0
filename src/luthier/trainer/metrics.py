"""Numbers of an evaluation besides the loss: what the model would have said at each supervised position.

A metric is a function of all rows of an evaluation set. The rows come from the same forward pass as the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch

from luthier.model.logprobs import ModelPolicy
from luthier.recipe.problems import nearest
from luthier.trainer.plugins import FORMS, describe, load_named
from luthier.types import IGNORE_INDEX, Batch, EvalRow, RecipeError, TokenLogprobs

MetricFunction = Callable[[Sequence[EvalRow]], Mapping[str, float] | float]


def accuracy(rows: Sequence[EvalRow]) -> float:
    """The mean over samples of the share of targets that were the most likely token.

    Every sample counts the same, however long; so LLaMA-Factory computes its `compute_accuracy` too. Loss weights
    play no part.
    """
    return float(np.mean([np.mean(row.predictions == row.targets) for row in rows])) if rows else float("nan")


METRICS: dict[str, MetricFunction] = {"accuracy": accuracy}


@dataclass(frozen=True, slots=True)
class Metric:
    """A function of the rows of an evaluation set, and the name of its number where it gives only one."""

    name: str
    function: MetricFunction


def load_metrics(references: Sequence[str], beside: Path | None) -> tuple[Metric, ...]:
    """The metrics that `train.metrics` names. Raises RecipeError for one that does not exist or is no function."""
    key = "train.metrics"
    metrics: dict[str, Metric] = {}
    for reference in references:
        if reference in METRICS:
            metric = Metric(reference, METRICS[reference])
        elif ":" not in reference:
            near = nearest(reference, list(METRICS))
            hint = f"did you mean {near}? " if near else ""
            raise RecipeError(
                f"{key}: {reference!r} is no metric; {hint}choose from {', '.join(METRICS)}, or name a function of "
                f"yours as {FORMS}"
            )
        else:
            function = load_named(reference, key, beside)
            if not callable(function) or isinstance(function, type):
                raise RecipeError(
                    f"{key}: {reference} is {describe(function)}; a metric is a function of the evaluated rows "
                    f"(see luthier.types.EvalRow)"
                )
            metric = Metric(reference.rpartition(":")[2], function)
        if metric.name in metrics:
            raise RecipeError(f"{key}: two metrics are called {metric.name}; rename one")
        metrics[metric.name] = metric
    return tuple(metrics.values())


def measure(metrics: Sequence[Metric], rows: Sequence[EvalRow], prefix: str) -> dict[str, float]:
    """Every number of every metric, as `<prefix>_<name>`.

    Raises RecipeError where a metric gives something else than a number or numbers by name, or a name that is
    taken. What a metric itself raises goes on, with a note that says which it was.
    """
    report: dict[str, float] = {}
    for metric in metrics:
        try:
            answer = metric.function(rows)
        except Exception as error:
            error.add_note(f"in the metric {metric.name} of train.metrics, over {len(rows)} rows of {prefix}")
            raise
        numbers = answer if isinstance(answer, Mapping) else {metric.name: answer}
        for name, value in numbers.items():
            report = joined(report, {f"{prefix}_{name}": _number(value, metric.name, name)})
    return report


def joined(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """Both together. Raises RecipeError for a name that both have."""
    taken = sorted(first.keys() & second.keys())
    if taken:
        raise RecipeError(f"train.metrics: the name {taken[0]} is taken; let the metric report another")
    return {**first, **second}


def _number(value: Any, metric: str, name: Any) -> float:
    if isinstance(value, np.ndarray | torch.Tensor) and value.ndim == 0:
        value = value.item()
    if not isinstance(name, str) or not isinstance(value, Real):
        raise RecipeError(
            f"train.metrics: {metric} gave {name!r}: {value!r}; a metric gives a number, or numbers by name"
        )
    return float(value)


class RecordingPolicy:
    """A `types.Policy` that passes every answer on and keeps it in `rows`, the most likely tokens included."""

    def __init__(self, policy: ModelPolicy) -> None:
        self._policy = policy
        self.rows: list[EvalRow] = []

    def reference_logprobs(self, batch: Batch, *, temperature: float = 1.0) -> torch.Tensor:
        return self._policy.reference_logprobs(batch, temperature=temperature)

    def scores(self, batch: Batch) -> torch.Tensor:
        return self._policy.scores(batch)

    def logprobs(self, batch: Batch, *, temperature: float = 1.0, **wanted: Any) -> TokenLogprobs:
        answers = self._policy.logprobs(batch, predictions=True, temperature=temperature, **wanted)
        self.rows += evaluated_rows(batch, answers)
        return answers


def evaluated_rows(batch: Batch, answers: TokenLogprobs) -> list[EvalRow]:
    """A row for each segment of the batch that has targets, in their order; `answers` includes predictions."""
    assert answers.predictions is not None
    supervised_N = (batch.targets != IGNORE_INDEX).nonzero()[:, 0]
    segments_N = torch.searchsorted(batch.cu_seqlens[1:].long(), supervised_N, right=True)
    bounds = torch.bincount(segments_N, minlength=batch.num_segments).cumsum(0)[:-1].tolist()
    columns = (
        batch.targets[supervised_N],
        answers.predictions,
        answers.logprobs,
        batch.target_weights[supervised_N],
    )
    arrays = [np.split(column.detach().cpu().numpy(), bounds) for column in columns]
    parts = zip(batch.samples, *arrays, strict=True)
    return [EvalRow(*sample, *values) for sample, *values in parts if len(values[0])]
