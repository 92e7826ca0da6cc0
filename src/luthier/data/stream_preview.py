"""What is known of a stream before it is read: its first rows, tokenized, and the rows that `data.dev_split` takes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from luthier.data.cache import content_key
from luthier.data.formats import require_kind
from luthier.data.mixing import check_mix
from luthier.data.prepare import DEV, Preparation, PreparedData, Progress, prepare
from luthier.data.read import RawRow, columns_seen
from luthier.data.registry import DatasetAttr, resolve_datasets
from luthier.data.report import DataReport, ReportBuilder
from luthier.data.row_stream import RowStream, StreamOrder, StreamRow, StreamSet
from luthier.data.streaming import Packing, SampleStream, encode_rows, units_of
from luthier.data.table import SampleTable
from luthier.recipe.schema import DataSpec
from luthier.types import DataError, Sample

PREVIEW = 1000
"""Rows of each set that are looked at before training: reports, examples and estimates are of them."""
_ENDS = 1 << 16
"""Bytes at the beginning and at the end of a file that tell it from another one."""
_PIECES, _PIECE = 256, 1 << 12
"""Pieces between them, and bytes of each: at most 1 MiB of a file of any size, all of one of 1 MiB."""


@dataclass(frozen=True, slots=True)
class PreparedStream:
    """The stream, and in `data.train` the first rows of it."""

    data: PreparedData
    stream: SampleStream


def prepare_stream(
    spec: DataSpec,
    how: Preparation,
    progress: Progress | None = None,
    *,
    seed: int,
    packed: bool,
    mismatched: bool = False,
) -> PreparedStream:
    """Look at the first rows of the training sets, and tokenize the evaluation sets as ever.

    seed: of the order. packed: whether rows are filled with several samples. `dev_split` takes the first rows that the
    stream gives in the order of the files, each set in its turn; the stream is without them. Raises DataError for
    anything wrong with the rows that are looked at.
    """
    assert spec.stream is not None
    attrs = resolve_datasets(spec.train, spec)
    for attr in attrs:
        require_kind(attr, how.kind, how.identity.get("stage", how.kind))
        _check_set(attr)
    names = [attr.name for attr in attrs]
    check_mix(spec.mix, names, None)
    sets = [
        StreamSet(attr, 0, spec.max_samples, cache_dir=how.hub_cache, token=how.hub_token) for attr in attrs
    ]
    order = StreamOrder(sets, spec.mix, seed, spec.stream.buffer if spec.shuffle else 1)
    packing: Packing = (
        "no" if not (spec.packing and packed) else "llamafactory" if how.llamafactory else "groups"
    )
    stream = SampleStream(order, how, spec.max_length, packing, mismatched, spec.workers)
    held_out = _held_out(stream, int(spec.dev_split))
    stream = replace(stream, order=replace(order, sets=_without(sets, held_out)))
    data = prepare(spec.model_copy(update={"train": (), "dev_split": 0.0}), how, progress)
    evaluation = data.eval
    if held_out:
        evaluation = {DEV: SampleTable.of_mixed(_samples(stream, held_out)), **data.eval}
    _no_twins([*names, *data.fingerprints, *([DEV] if held_out else [])])
    train, reports = _first_rows(stream, progress)
    keys = {attr.name: _fingerprint(attr, spec, how, order) for attr in attrs}
    return PreparedStream(
        PreparedData(train, evaluation, [*reports, *data.reports], {**keys, **data.fingerprints}), stream
    )


def _check_set(attr: DatasetAttr) -> None:
    attr.check_sha1()
    if attr.num_samples is not None:
        raise DataError(
            f"data set {attr.name!r}: num_samples draws among all rows, and a stream does not know them; remove it, or "
            "data.stream (data.max_samples takes the first ones)"
        )


def _no_twins(names: Sequence[str]) -> None:
    twins = sorted({name for name in names if names.count(name) > 1})
    if twins:
        raise DataError(f"data.train: two data sets are called {twins[0]!r}; give one of them another name")


def _held_out(stream: SampleStream, wanted: int) -> list[StreamRow]:
    """The first rows in the order of the files."""
    if not wanted:
        return []
    rows, taken = RowStream(replace(stream.order, buffer=1)), list[StreamRow]()
    while len(taken) < wanted:
        if rows.finished:
            raise DataError(
                f"data.dev_split: {wanted} rows are to be held out, and an epoch has {len(taken)}; both parts need rows"
            )
        taken.append(rows.take())
    return taken


def _without(sets: Sequence[StreamSet], held_out: Sequence[StreamRow]) -> list[StreamSet]:
    """The sets from the first row on that is not held out."""
    found = []
    for number, one in enumerate(sets):
        skipped = max((row.index + 1 for row in held_out if row.set == number), default=0)
        limit = None if one.limit is None else max(0, one.limit - skipped)
        found.append(replace(one, skipped=skipped, limit=limit))
    return found


def _samples(stream: SampleStream, rows: Sequence[StreamRow]) -> list[Sample]:
    return [sample for *_, encoded in encode_rows(stream, rows) for sample in encoded.samples]


def _first_rows(stream: SampleStream, progress: Progress | None) -> tuple[SampleTable, list[DataReport]]:
    """The samples of the first rows of each set in the order of the files, and what became of those rows."""
    tables, reports = [], []
    for number, one in enumerate(stream.order.sets):
        builder, name = ReportBuilder(one.attr.name), one.attr.name
        limit = PREVIEW if one.limit is None else min(PREVIEW, one.limit)
        unread = islice(one.open(), one.skipped, one.skipped + limit)
        rows = [StreamRow(number, one.skipped + i, row) for i, row in enumerate(unread)]
        raws = (RawRow(row.index, row.row.place, row.row.parsed()) for row in rows)
        for done, _ in enumerate(columns_seen(raws, one.attr), start=1):
            if progress is not None:
                progress(name, done)
        encoded = encode_rows(stream, rows)
        for _, index, each in encoded:
            builder.add(index, each)
        placed = [(i, sample) for i, (*_, each) in enumerate(encoded) for sample in each.samples]
        tables.append(SampleTable.of(placed, name))
        reports.append(builder.report())
    table = SampleTable.concat(tables, [report.rows for report in reports])
    if not len(table):
        losses = "; ".join(text for report in reports if (text := report.losses()))
        raise DataError(f"nothing to train on in the first {PREVIEW} rows of each set: {losses}")
    return _packed(stream, table), reports


def _packed(stream: SampleStream, table: SampleTable) -> SampleTable:
    """The table with the groups that packing makes of its samples."""
    if stream.packing == "no":
        return table
    units = units_of(stream, list(table))
    ends = np.cumsum([0, *map(len, units)]).tolist()
    groups = [list(range(start, stop)) for start, stop in pairwise(ends)]
    return SampleTable.of_mixed([sample for unit in units for sample in unit]).with_groups(groups)


def _fingerprint(attr: DatasetAttr, spec: DataSpec, how: Preparation, order: StreamOrder) -> str:
    """What tells a set from another one without reading it: the size of each file and some of its bytes; of a
    data set on the hub, its name and revision. And what decides its tokens and its order."""
    description: dict[str, Any] = asdict(attr) | {
        "columns": attr.columns.model_dump(),
        "tags": attr.tags.model_dump(),
        "named": sorted(attr.named),
        "path": attr.path if attr.load_from == "hub" else "",
    }
    return content_key(
        {
            "files": [_sampled(file) for file in attr.files()],
            "set": description,
            "kind": how.kind,
            "rows": [spec.max_samples, spec.dev_split],
            "template": how.template.fingerprint,
            "encode": how.identity,
            "order": [order.seed, order.buffer],
        }
    )


def _sampled(file: Path) -> list[Any]:
    """Size and hash of both ends and of pieces in between, evenly spread; of a small file, of all its bytes.

    Not the time of its last change: a copy of the file on another machine is the same data.
    """
    size, digest = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as stream:
        digest.update(stream.read(_ENDS))
        for number in range(_PIECES):
            stream.seek(max(stream.tell(), size * number // _PIECES))
            digest.update(stream.read(_PIECE))
        stream.seek(max(0, size - _ENDS))
        digest.update(stream.read(_ENDS))
    return [size, digest.hexdigest()]
