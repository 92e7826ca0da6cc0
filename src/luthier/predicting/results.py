"""What predictions are worth: numbers with intervals, the difference to other predictions, worst and best rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.measures.intervals import DRAWS, LEVEL, SEED, Interval, intervals, paired
from luthier.measures.text import ComputeMetrics, TextScores
from luthier.predicting.record import Prediction, find_predictions, read_predictions
from luthier.types import DataError

SHOWN = 3
"""Worst and best rows that are shown."""
ORDERED_BY = "rouge-l"
"""The number that orders rows from worst to best."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Numbers of predictions with their intervals, of all rows and of each data set."""

    predictions: list[Prediction]
    scores: TextScores
    numbers: Mapping[str, Interval]
    datasets: Mapping[str, Mapping[str, Interval]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As LLaMA-Factory names them, `predict_<metric>`; their intervals beside them."""
        tree: dict[str, Any] = {f"predict_{name}": round(one.value, 4) for name, one in self.numbers.items()}
        tree["intervals"] = {name: one.to_list() for name, one in self.numbers.items()}
        if len(self.datasets) > 1:
            tree["datasets"] = {
                dataset: {
                    **{f"predict_{name}": round(one.value, 4) for name, one in numbers.items()},
                    "intervals": {name: one.to_list() for name, one in numbers.items()},
                }
                for dataset, numbers in self.datasets.items()
            }
        tree["bootstrap"] = {"level": LEVEL, "draws": DRAWS, "seed": SEED}
        tree["sacrebleu"] = dict(self.scores.signatures)
        tree["finish"] = dict(sorted(Counter(one.finish for one in self.predictions).items()))
        tree["bad_scores"] = sum(one.bad_scores for one in self.predictions)
        return tree

    def extremes(self, count: int = SHOWN) -> tuple[list[Prediction], list[Prediction]]:
        """The worst rows and the best, worst and best first; no row is in both."""
        values = self.scores.rows[ORDERED_BY]
        order = sorted(range(len(values)), key=lambda place: (values[place], place))
        count = min(count, len(order) // 2)
        worst, best = order[:count], order[::-1][:count]
        return [self.predictions[place] for place in worst], [self.predictions[place] for place in best]


def measure_predictions(predictions: Sequence[Prediction]) -> Measured:
    """Raises RecipeError where a library of the metrics is missing."""
    scores = _scores(predictions)
    places: dict[str, list[int]] = {}
    for place, one in enumerate(predictions):
        places.setdefault(one.dataset, []).append(place)
    datasets = {}
    if len(places) > 1:
        parts = {name: scores.take(rows) for name, rows in places.items()}
        datasets = {name: intervals(part.numbers, len(part)) for name, part in parts.items()}
    return Measured(list(predictions), scores, intervals(scores.numbers, len(scores)), datasets)


def _scores(predictions: Sequence[Prediction]) -> TextScores:
    return ComputeMetrics().scores([one.predict for one in predictions], [one.label for one in predictions])


@dataclass(frozen=True, slots=True)
class Comparison:
    """By how much predictions are better than `other`, with the interval of the paired difference."""

    other: str
    theirs: Mapping[str, float]
    differences: Mapping[str, Interval]

    def to_dict(self) -> dict[str, Any]:
        return {
            "with": self.other,
            "numbers": {name: round(value, 4) for name, value in self.theirs.items()},
            "differences": {name: round(one.value, 4) for name, one in self.differences.items()},
            "intervals": {name: one.to_list() for name, one in self.differences.items()},
        }


def read_comparable(where: str | Path) -> tuple[Path, list[Prediction]]:
    """The predictions to compare with, in the order of their rows. Raises DataError where there are none."""
    file = find_predictions(Path(where).expanduser())
    found = sorted(read_predictions(file), key=lambda one: one.index)
    if not found:
        raise DataError(f"{file} holds no predictions")
    return file, found


def compare(measured: Measured, file: Path, others: Sequence[Prediction]) -> Comparison:
    """Row by row. Raises DataError, naming the row, where the others answer other rows or prompts."""
    require_same_rows(measured.predictions, file, others)
    theirs = _scores(others)
    differences = paired(measured.scores.numbers, theirs.numbers, len(theirs))
    return Comparison(str(file), theirs.numbers(), differences)


def require_same_rows(predictions: Sequence[Prediction], file: Path, others: Sequence[Prediction]) -> None:
    """Raise DataError where two predictions are not of the same rows: matched by index, prompt and label."""
    ours, theirs = {one.index for one in predictions}, {one.index for one in others}
    if ours != theirs:
        only = sorted(ours ^ theirs)[0]
        whose = "these predictions" if only in ours else str(file)
        raise DataError(
            f"{file} does not answer the same rows: it has {len(theirs)} and these are {len(ours)}; row {only} is only "
            f"in {whose}"
        )
    for one, other in zip(predictions, others, strict=True):
        for name in ("prompt", "label"):
            mine, its = getattr(one, name), getattr(other, name)
            if mine != its:
                raise DataError(
                    f"{file} does not answer the same rows: row {one.index} has another {name} there, "
                    f"{its[-60:]!r} instead of {mine[-60:]!r}"
                )
