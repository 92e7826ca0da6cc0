"""What became of every row: read, dropped and why, cut, unsupervised. Nothing is lost quietly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from luthier.columns import aligned
from luthier.types import DataError, Encoded, Sample

PERCENTILES = (50, 90, 99, 100)
_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class DataReport:
    """One data set after encoding.

    `dropped` counts rows by reason, `examples` gives the first row numbers of each reason. `cut_rows` are
    rows that lost `cut_tokens` tokens to `data.max_length`, `lost_answers` answers of them entirely.
    `unsupervised` counts rows that are kept without any target. `lost_rows` counts each row once that is
    dropped, cut or unsupervised. `lengths` are percentiles of the samples' tokens; where answers continue a prompt,
    those of the prompt with the longest of them.
    """

    dataset: str
    rows: int = 0
    samples: int = 0
    tokens: int = 0
    targets: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    examples: Mapping[str, Sequence[int]] = field(default_factory=dict)
    cut_rows: int = 0
    cut_tokens: int = 0
    lost_answers: int = 0
    unsupervised: int = 0
    lost_rows: int = 0
    lengths: Mapping[str, int] = field(default_factory=dict)

    @property
    def lost_share(self) -> float:
        """Share of the rows that are dropped, cut or unsupervised."""
        return self.lost_rows / self.rows if self.rows else 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"lost_share": self.lost_share}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> DataReport:
        return cls(**{key: value for key, value in tree.items() if key != "lost_share"})

    def losses(self) -> str:
        """The losses in one sentence; "" where there are none."""
        parts = [
            f"{count} dropped ({reason}; row {_rows(self.examples.get(reason, ()))})"
            for reason, count in self.dropped.items()
        ]
        if self.cut_rows:
            parts.append(f"{self.cut_rows} cut ({self.cut_tokens} tokens, {self.lost_answers} whole answers)")
        if self.unsupervised:
            parts.append(f"{self.unsupervised} without any target")
        return (
            f"{self.dataset}: {self.lost_rows} of {self.rows} rows lost: {', '.join(parts)}" if parts else ""
        )


class ReportBuilder:
    """Counts rows as they are encoded."""

    def __init__(self, dataset: str, counted: Mapping[str, Any] | None = None) -> None:
        """`counted` is the `state` of a builder that this one goes on from."""
        self._dataset = dataset
        self._counts = dict.fromkeys(
            (
                "rows",
                "tokens",
                "targets",
                "cut_rows",
                "cut_tokens",
                "lost_answers",
                "unsupervised",
                "lost_rows",
            ),
            0,
        )
        self._dropped: dict[str, int] = {}
        self._examples: dict[str, list[int]] = {}
        self._lengths: Counter[int] = Counter()
        if counted is not None:
            self._counts |= counted["counts"]
            self._dropped |= counted["dropped"]
            self._examples |= {reason: list(rows) for reason, rows in counted["examples"].items()}
            self._lengths.update({int(length): times for length, times in counted["lengths"]})

    def state(self) -> dict[str, Any]:
        """What was counted so far, as JSON values."""
        return {
            "counts": dict(self._counts),
            "dropped": dict(self._dropped),
            "examples": {reason: list(rows) for reason, rows in self._examples.items()},
            "lengths": sorted(self._lengths.items()),
        }

    def merge(self, state: Mapping[str, Any]) -> None:
        """Count the rows whose `state` another builder has, and which come after all that were counted here."""
        for name, count in state["counts"].items():
            self._counts[name] += count
        for reason, count in state["dropped"].items():
            self._dropped[reason] = self._dropped.get(reason, 0) + count
            rows = self._examples.setdefault(reason, [])
            rows += state["examples"].get(reason, ())[: _EXAMPLES - len(rows)]
        for length, times in state["lengths"]:
            self._lengths[int(length)] += times

    def add(self, index: int, encoded: Encoded) -> None:
        """Count row `index` of the data set."""
        counts, lost = self._counts, encoded.lost
        targets = sum(int(np.count_nonzero(sample.weights[1:])) for sample in encoded.samples)
        unsupervised = bool(encoded.samples) and targets == 0 and not encoded.prompts
        counts["rows"] += 1
        counts["tokens"] += sum(len(sample) for sample in encoded.samples)
        counts["targets"] += targets
        counts["unsupervised"] += unsupervised
        counts["cut_rows"] += lost.dropped is None and lost.tokens > 0
        counts["cut_tokens"] += lost.tokens
        counts["lost_answers"] += lost.answers
        counts["lost_rows"] += lost.dropped is not None or lost.tokens > 0 or unsupervised
        for sample in encoded.samples:
            self._lengths[_longest_row(sample)] += 1
        if lost.dropped is not None:
            self._dropped[lost.dropped] = self._dropped.get(lost.dropped, 0) + 1
            rows = self._examples.setdefault(lost.dropped, [])
            if len(rows) < _EXAMPLES:
                rows.append(index)

    def report(self) -> DataReport:
        values, times = np.array(sorted(self._lengths.items()), np.int64).reshape(-1, 2).T
        until, samples = np.cumsum(times), int(times.sum())
        percentiles = {
            # the largest length of which at most p percent of the steps between samples lie before: method "lower"
            f"p{p}": int(values[np.searchsorted(until, (samples - 1) * p // 100, side="right")])
            for p in PERCENTILES
            if samples
        }
        return DataReport(
            dataset=self._dataset,
            samples=samples,
            dropped=dict(self._dropped),
            examples={reason: list(rows) for reason, rows in self._examples.items()},
            lengths=percentiles,
            **self._counts,
        )


def check_max_lost(reports: Sequence[DataReport], max_lost: float | None) -> None:
    """Raise DataError if a data set loses more than `max_lost` of its rows; None allows everything."""
    if max_lost is None:
        return
    bad = [report for report in reports if report.lost_share > max_lost]
    if bad:
        raise DataError(
            "; ".join(report.losses() for report in bad)
            + f". That is more than data.max_lost allows ({max_lost:.2%}). Mend the data, "
            "raise data.max_length, choose data.overflow, or set data.max_lost: null to accept it"
        )


def format_reports(reports: Sequence[DataReport]) -> str:
    """The reports as a plain text table, one line per data set, followed by the losses."""
    head = [
        "data set",
        "rows",
        "dropped",
        "cut",
        "no target",
        "samples",
        "tokens",
        "targets",
        "p50",
        "p90",
        "p99",
        "max",
    ]
    lines = [head]
    for r in reports:
        lengths = [str(r.lengths.get(f"p{p}", 0)) for p in PERCENTILES]
        counts = (r.rows, sum(r.dropped.values()), r.cut_rows, r.unsupervised, r.samples, r.tokens, r.targets)
        lines.append([r.dataset, *(f"{count:,}" for count in counts), *lengths])
    return "\n".join([aligned(lines, left=1), *(text for report in reports if (text := report.losses()))])


def _longest_row(sample: Sample) -> int:
    """Tokens of the sample, or of its prompt with the longest of its answers."""
    if not sample.branches:
        return len(sample)
    ends = (*sample.branches, len(sample))
    return ends[0] + max((stop - start for start, stop in pairwise(ends)), default=0)


def _rows(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows))
