"""The likelihood of texts by exact sums: each target counts once, whatever the passes and windows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.evaluating.judge import Judge
from luthier.measures.intervals import Interval, ends, ratio, ratio_difference
from luthier.types import DataError, Sample


@dataclass(frozen=True, slots=True)
class TokenSet:
    """A data set as tokens. sizes: UTF-8 bytes and words of each row of plain text. left_out: rows that say nothing,
    counted by reason."""

    name: str
    kind: str
    samples: Sequence[Sample]
    sizes: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RowSum:
    """Of one row: sum_t w_t (-log p_t) in nats, sum_t w_t, and its targets."""

    nll: float
    weight: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Likelihood:
    """What a model says of a data set: the sums of every row by its number."""

    data: TokenSet
    rows: Mapping[int, RowSum]

    @property
    def loss(self) -> float:
        """Nats per target, weighted as the stage weighs them: what training calls eval_loss."""
        return math.fsum(row.nll for row in self.rows.values()) / self._weight

    @property
    def _weight(self) -> float:
        return math.fsum(row.weight for row in self.rows.values())

    @property
    def interval(self) -> Interval | None:
        """Of the loss, over rows."""
        rows = self.rows.values()
        return ratio([row.nll for row in rows], [row.weight for row in rows])

    def to_dict(self) -> dict[str, Any]:
        interval = ends(self.interval)
        found: dict[str, Any] = {
            "name": self.data.name,
            "kind": self.data.kind,
            "rows": len(self.rows),
            "tokens": sum(row.tokens for row in self.rows.values()),
            "loss": self.loss,
            "loss_interval": interval,
            "perplexity": _exp(self.loss),
            "perplexity_interval": None if interval is None else [_exp(end) for end in interval],
        }
        if self.data.sizes:
            total = math.fsum(row.nll for row in self.rows.values())
            sizes = [self.data.sizes[index] for index in self.rows]
            num_bytes, num_words = sum(size[0] for size in sizes), sum(size[1] for size in sizes)
            found["bits_per_byte"] = total / math.log(2) / num_bytes
            found["byte_perplexity"] = _exp(total / num_bytes)
            found["word_perplexity"] = _exp(total / num_words)
        if self.data.left_out:
            found["left_out"] = dict(self.data.left_out)
        return found


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def likelihood(judge: Judge, data: TokenSet) -> Likelihood:
    """The sums of every row. Raises DataError for a set without a target."""
    parts: dict[int, list[tuple[float, float, int]]] = {}
    samples = [sample for sample in data.samples if (sample.weights[1:] > 0).any()]
    for number, found in judge.judge(samples):
        sample = samples[number]
        weights = sample.weights[1:][sample.weights[1:] > 0].astype("float64")
        nll = math.fsum((-weights * found.logprobs).tolist())
        parts.setdefault(sample.index, []).append((nll, math.fsum(weights.tolist()), len(weights)))
    if not parts:
        raise DataError(f"{data.name}: no row has a target; {_reasons(data.left_out)}")
    rows = {
        index: RowSum(math.fsum(p[0] for p in row), math.fsum(p[1] for p in row), sum(p[2] for p in row))
        for index, row in sorted(parts.items())
    }
    return Likelihood(data, rows)


def _reasons(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} ({count})" for reason, count in left_out.items()) or "the data set is empty"


def difference(tuned: Likelihood, other: Likelihood) -> dict[str, Any] | None:
    """The loss of the first less that of the second, and its interval: per target where both see the same ones, else
    in bits per byte of plain text; None where neither can be compared."""
    shared = [index for index in tuned.rows if index in other.rows]
    mine, theirs = ([one.rows[index] for index in shared] for one in (tuned, other))
    same = all((a.weight, a.tokens) == (b.weight, b.tokens) for a, b in zip(mine, theirs, strict=True))
    if not shared or not (same or tuned.data.sizes):
        return None
    if same:
        unit, sizes = "nats per token", ([row.weight for row in mine], [row.weight for row in theirs])
        totals = ([row.nll for row in mine], [row.nll for row in theirs])
    else:
        num_bytes = [float(tuned.data.sizes[index][0]) for index in shared]
        unit, sizes = "bits per byte", (num_bytes, num_bytes)
        totals = ([row.nll / math.log(2) for row in mine], [row.nll / math.log(2) for row in theirs])
    value = math.fsum(totals[0]) / math.fsum(sizes[0]) - math.fsum(totals[1]) / math.fsum(sizes[1])
    interval = ends(ratio_difference(totals, sizes))
    return {"unit": unit, "value": value, "interval": interval, "rows": len(shared)}


def sliding(sample: Sample, window: int, stride: int) -> Iterator[Sample]:
    """A long sample as windows of at most `window` tokens that begin `stride` tokens apart.

    Each counts the targets that the windows before it did not, so every one counts once, with at least
    window - stride tokens of context, or all there are.
    """
    counted, start = 0, 0
    while counted < len(sample):
        stop = min(start + window, len(sample))
        weights = sample.weights[start:stop].copy()
        weights[: max(counted - start, 0)] = 0
        yield Sample(sample.input_ids[start:stop], weights, sample.source, sample.index)
        counted, start = stop, start + stride
