"""Data sets -> tokens to be judged: the evaluation sets of a run as it had them, or any set by name or file.

own_sets(run, template, ...)        those of the recipe: data.eval and what dev_split held out
named_set(attr, ...)                one described set: answers as stage sft weighs them, or plain text in windows
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from luthier.data.collate import rows_of
from luthier.data.encode import EncodeOptions, sft_sample
from luthier.data.formats import to_row
from luthier.data.prepare import PreparedData, prepare
from luthier.data.read import read_rows
from luthier.data.registry import DatasetAttr
from luthier.data.table import SampleTable
from luthier.data.template import ChatTemplate
from luthier.evaluating.perplexity import TokenSet, sliding
from luthier.material import preparation
from luthier.recipe.schema import DataSpec, PtSpec, Recipe
from luthier.types import Row, RowError, RowKind, Sample, Stage

_UNCUT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Windows:
    """Texts longer than `window` tokens are seen in windows that begin `stride` tokens apart."""

    window: int
    stride: int


# --------------------------------------------------------------------------------------------------
# The sets of a run


def own_sets(run: Recipe, template: ChatTemplate) -> list[TokenSet]:
    """The evaluation sets of a run with the targets and weights that its own evaluation had.

    A set of pairs becomes two, one of the better answers and one of the worse; so with feedback. Raises DataError for
    data that is not there any more.
    """
    stage, data = prepared(run, template)
    return [one for name, table in data.eval.items() for one in _parts(name, stage, table)]


def prepared(run: Recipe, template: ChatTemplate) -> tuple[Stage, PreparedData]:
    """The stage of a run, and its evaluation sets as the run tokenized them."""
    spec = run.data if run.data.dev_split else run.data.model_copy(update={"train": ()})
    stage, how = preparation(run, template)
    return stage, prepare(spec, how)


def _parts(name: str, stage: Stage, table: SampleTable) -> Iterator[TokenSet]:
    samples = list(table)
    if stage.kind == "pair":
        for k, title in enumerate(("chosen", "rejected")):
            yield TokenSet(f"{name} ({title})", "pair", [rows_of(sample)[k] for sample in samples])
    elif stage.kind == "feedback":
        for label, title in ((1.0, "desirable"), (0.0, "undesirable")):
            chosen = [rows_of(sample)[0] for sample in samples if sample.label == label]
            if chosen:
                yield TokenSet(f"{name} ({title})", "feedback", chosen)
    else:
        yield TokenSet(name, stage.kind, samples)


# --------------------------------------------------------------------------------------------------
# Sets by name


def kind_of(attr: DatasetAttr, run: Recipe | None) -> RowKind:
    """What a described set is read as: pairs give their better answers; a set without answers is plain text."""
    if attr.ranking:
        return "pair"
    if run is not None and isinstance(run.stage, PtSpec):
        return "text"
    columns = attr.columns
    return "text" if columns.messages is None and columns.response is None else "conversation"


def named_set(
    attr: DatasetAttr,
    kind: RowKind,
    template: ChatTemplate,
    windows: Windows,
    *,
    run: Recipe | None = None,
    limit: int | None = None,
) -> TokenSet:
    """A described set, nothing of it cut: of conversations the answers are targets, with the weights that the run's
    recipe gives them; of plain text every token is, the first one after the begin or end token of documents.

    Raises DataError for files that cannot be read, naming file and row.
    """
    data = run.data if run is not None else DataSpec()
    how = EncodeOptions.of(data, "sft", llamafactory=data.rules == "llamafactory")
    options = replace(how, max_length=_UNCUT, overflow="error")
    left_out: Counter[str] = Counter()
    samples: list[Sample] = []
    sizes: dict[int, tuple[int, int]] = {}
    for raw in islice(read_rows(attr), limit):
        try:
            row = to_row(raw, attr, kind)
        except RowError as error:
            left_out[error.reason] += 1
            continue
        if kind == "text":
            encoded: Iterable[Sample] = _text(row, template, sizes, left_out)
        else:
            found = sft_sample(row, template, options)
            encoded = found.samples
            if found.lost.dropped is not None:
                left_out[found.lost.dropped] += 1
        for sample in encoded:
            if sample.media and len(sample) > windows.window:
                left_out["images, films or sounds, and longer than the window"] += 1
                continue
            samples += _fitting(replace(sample, opener=template.opener), windows)
    name = f"{attr.name} (chosen)" if kind == "pair" else attr.name
    return TokenSet(name, kind, samples, sizes, left_out)


def _text(
    row: Row, template: ChatTemplate, sizes: dict[int, tuple[int, int]], left_out: Counter[str]
) -> Iterator[Sample]:
    text = row.text or ""
    if not text.strip():
        left_out["empty text"] += 1
        return
    before = template.begin_ids or template.document("")[-1:]
    ids = np.array([*before, *template.text(text)], np.int32)
    sizes[row.index] = (len(text.encode()), len(re.split(r"\s+", text)))
    yield Sample(ids, np.ones(len(ids), np.float32), row.source, row.index)


def _fitting(sample: Sample, windows: Windows) -> Iterator[Sample]:
    if len(sample) <= windows.window:
        yield sample
        return
    for part in sliding(sample, windows.window, windows.stride):
        if (part.weights[1:] > 0).any():
            yield part
