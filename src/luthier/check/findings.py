"""What `luthier check` found, as values, and as the JSON that machines read.

The object that `--json` prints has these keys; a part that could not be found out is null or empty:

    ok               bool: nothing was found that `train` would refuse
    problems         [{part, kind, message}]: the messages are those of `train`; kind is the class of the error
    notes            [str]
    recipe           [{key, value, origin}]: what was given or decided by the machine; everything with --all
    hardware         {device, name, memory, bf16, cores, world_size}
    datasets         [{dataset, rows, samples, tokens, targets, dropped, examples, cut_rows, cut_tokens, lost_answers,
                     unsupervised, lost_rows, lost_share, lengths, part, histogram: {edges, counts}}]
    mixture          [{dataset, samples, different, of, sample_share, token_share}] of the first epoch, with several
                     training sets
    samples          [{dataset, row, learnt, tokens: [{id, text, weight, learnt}], answers: [{name, learnt, tokens}]}];
                     where there are answers, `tokens` are the prompt that each of them continues
    parameters       {kind: {trainable, total}}, with the kind "all" for the sum
    schedule         {steps_per_epoch, steps, epochs, tokens_per_epoch, tokens_per_step, least_tokens, most_tokens,
                     passes_per_step, longest_pass, padding_share}
    memory           {total, limit, fits, fullest, parts: {part: bytes}, moments: {moment: bytes}}
    probe            {passes, tokens, tokens_per_second, optimizer_seconds, seconds_per_epoch, seconds, peak}
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import numpy as np

from luthier.check.memory import Memory
from luthier.check.mixture import Share
from luthier.check.probe import Probe
from luthier.check.schedule import Schedule
from luthier.check.tokens import ShownSample
from luthier.data.report import DataReport
from luthier.data.table import Int64
from luthier.methods.groups import ParameterCount
from luthier.recipe.load import DEFAULT, LoadedRecipe, leaves
from luthier.recipe.resolve import Hardware
from luthier.recipe.source import dotted
from luthier.types import LuthierError

Found = TypeVar("Found")

BARS = 24
"""Bars of a length histogram."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One refusal: the part of the run that it is about, the error's class, and the message that `train` gives."""

    part: str
    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class Setting:
    """One value of the recipe and where it came from; `value` is JSON-like."""

    key: str
    value: Any
    origin: str


@dataclass(frozen=True, slots=True)
class Histogram:
    """Samples by the length of their longest row: `counts[i]` of them have edges[i] <= tokens < edges[i + 1]."""

    edges: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DataSet:
    """One data set: its report, whether it is for training or for evaluation, and the lengths of its samples."""

    report: DataReport
    part: str
    histogram: Histogram

    def to_dict(self) -> dict[str, Any]:
        return self.report.to_dict() | {"part": self.part, "histogram": asdict(self.histogram)}


@dataclass(slots=True)
class Findings:
    """All that was found out; a field is empty or None where something before it failed."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    recipe: list[Setting] = field(default_factory=list)
    hardware: Hardware | None = None
    datasets: list[DataSet] = field(default_factory=list)
    mixture: list[Share] = field(default_factory=list)
    samples: list[ShownSample] = field(default_factory=list)
    parameters: dict[str, ParameterCount] = field(default_factory=dict)
    schedule: Schedule | None = None
    memory: Memory | None = None
    probe: Probe | None = None

    @property
    def ok(self) -> bool:
        return not self.problems

    def ask(self, part: str, question: Callable[[], Found]) -> Found | None:
        """The answer, or None where `train` would refuse here; the same message is kept once."""
        try:
            return question()
        except LuthierError as error:
            if str(error) not in {problem.message for problem in self.problems}:
                self.problems.append(Problem(part, type(error).__name__, str(error)))
            return None

    def to_dict(self) -> dict[str, Any]:
        """The object that the module's docstring describes."""
        return {
            "ok": self.ok,
            "problems": [asdict(problem) for problem in self.problems],
            "notes": self.notes,
            "recipe": [asdict(setting) for setting in self.recipe],
            "hardware": asdict(self.hardware) if self.hardware else None,
            "datasets": [dataset.to_dict() for dataset in self.datasets],
            "mixture": [share.to_dict() for share in self.mixture],
            "samples": [sample.to_dict() for sample in self.samples],
            "parameters": {kind: asdict(count) for kind, count in self.parameters.items()},
            "schedule": self.schedule.to_dict() if self.schedule else None,
            "memory": self.memory.to_dict() if self.memory else None,
            "probe": self.probe.to_dict() if self.probe else None,
        }


def settings_of(loaded: LoadedRecipe, *, everything: bool) -> list[Setting]:
    """The values that somebody gave or the machine decided, or all; secrets are not shown."""
    found = []
    for path, value in leaves(loaded.recipe).items():
        key = dotted(path)
        origin = loaded.origins.get(key, DEFAULT)
        if origin == DEFAULT and not everything and path[-1] != "type":
            continue
        secret = key in loaded.secrets and value is not None
        found.append(Setting(key, "(secret)" if secret else _plain(value), origin))
    return found


def _plain(value: Any) -> Any:
    """The value as JSON has it; a nested section without what nobody set."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def histogram_of(lengths: Int64) -> Histogram:
    """Lengths in bars of one whole width."""
    if not len(lengths):
        return Histogram((), ())
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(high + 1 - low) // BARS))
    edges = np.arange(low, high + 1 + width, width)  # the last one is above every length
    counts, _ = np.histogram(lengths, bins=edges)
    return Histogram(tuple(edges.tolist()), tuple(counts.tolist()))
