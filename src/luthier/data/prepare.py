"""The whole data path: recipe -> tokenized training and evaluation sets.

    prepare(spec, encode, template, ...) -> PreparedData

Each data set is read, formatted, checked and encoded once, and kept in the cache; the sets are put one after
the other, `dev_split` is taken out, and rows are packed where the recipe says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from luthier import __version__
from luthier.data.cache import CODE_VERSION, CountedPart, TokenCache, content_key, default_folder
from luthier.data.encode import blocks, media_of
from luthier.data.formats import require_kind, to_row
from luthier.data.media import Source
from luthier.data.media_stamps import media_stamps
from luthier.data.media_template import MediaTemplate
from luthier.data.mixing import check_mix, mixed_rows
from luthier.data.packing import best_fit, greedy_groups, in_order
from luthier.data.preparation import Preparation as Preparation
from luthier.data.read import SeenColumns, data_fingerprint, read_rows, unread_rows
from luthier.data.registry import DatasetAttr, resolve_datasets
from luthier.data.report import DataReport
from luthier.data.row_batches import EncodeBatch, EncodedBatch, row_batches
from luthier.data.table import SampleTable
from luthier.data.workers import encode_batches
from luthier.recipe.schema import DataSpec
from luthier.types import DataError, RowError

Progress = Callable[[str, int], None]
"""Called with the data set's name and the rows done so far."""

DEV = "dev"
"""Name of the evaluation set that `dev_split` makes."""

_WHERE = (
    "name",
    "path",
    "load_from",
    "revision",
    "subset",
    "split",
    "folder",
    "dataset_sha1",
    "media_directory",
)
"""What says where a data set is and not what is in it: its bytes do."""

_MAP_BATCH = 1000


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Tokenized data, one report for each data set (training first), and the cache keys by data set."""

    train: SampleTable
    eval: dict[str, SampleTable]
    reports: list[DataReport]
    fingerprints: dict[str, str]


def prepare(spec: DataSpec, how: Preparation, progress: Progress | None = None) -> PreparedData:
    """Tokenize what the recipe names.

    `dev_split` takes rows as LLaMA-Factory's `val_size` does: a permutation of all training rows by NumPy's
    default generator with the seed; its first ceil(share x rows) (or that many) rows are for evaluation, the
    others for training, both in the permutation's order.

    Raises DataError for anything wrong with the data, and where nothing is left to train on. Losses are only
    counted here; `report.check_max_lost` judges them.
    """
    cache = _cache(spec)
    attrs = {"train": resolve_datasets(spec.train, spec), "eval": resolve_datasets(spec.eval, spec)}
    reports: list[DataReport] = []
    fingerprints: dict[str, str] = {}
    tables: dict[str, list[SampleTable]] = {"train": [], "eval": []}
    for part, sets in attrs.items():
        _no_twins([attr.name for attr in sets], f"data.{part}")
    _require_names(spec, [attr.name for attr in attrs["train"]])
    for part, sets in attrs.items():
        for attr in sets:
            table, report, key = _one_dataset(attr, spec, how, cache, progress)
            tables[part].append(table)
            reports.append(report)
            fingerprints[attr.name] = key
    train = SampleTable.concat(tables["train"], [report.rows for report in reports[: len(tables["train"])]])
    train = train.with_opener(how.opener)
    num_rows = sum(report.rows for report in reports[: len(tables["train"])])
    if how.llamafactory and len(tables["train"]) > 1 and not spec.mix.is_plain:
        # That tool mixes rows before all else, once for all epochs.
        sizes = [report.rows for report in reports[: len(tables["train"])]]
        rows = mixed_rows(spec.mix, [attr.name for attr in attrs["train"]], sizes, seed=how.seed)
        train, num_rows = train.take_rows(rows), len(rows)
    evaluation = {
        attr.name: _arranged(table.with_opener(how.opener), spec, how)
        for attr, table in zip(attrs["eval"], tables["eval"], strict=True)
    }
    if spec.dev_split:
        _no_twins([*evaluation, DEV], "data.eval")
        kept, held_out = split_rows(num_rows, spec.dev_split, how.seed)
        evaluation = {DEV: _arranged(train.take_rows(held_out), spec, how), **evaluation}
        train = train.take_rows(kept)
    train = _arranged(train, spec, how)
    if spec.train and not len(train):
        losses = "; ".join(text for report in reports if (text := report.losses()))
        raise DataError(f"nothing to train on: {losses or 'the data sets are empty'}")
    return PreparedData(train, evaluation, reports, fingerprints)


def split_rows(num_rows: int, dev_split: float, seed: int) -> tuple[Any, Any]:
    """Row positions for training and for evaluation, as in `prepare`. Raises DataError if a part is empty."""
    wanted = math.ceil(dev_split * num_rows) if dev_split < 1 else int(dev_split)
    if not 0 < wanted < num_rows:
        raise DataError(
            f"data.dev_split: {dev_split:g} holds out {wanted} of {num_rows} rows; both parts need rows"
        )
    order = np.random.default_rng(seed).permutation(num_rows)
    return order[wanted:], order[:wanted]


def cache_key(attr: DatasetAttr, spec: DataSpec, how: Preparation) -> str:
    """The hash of all that decides a data set's tokens: bytes, format, template, tokenizer, options, code."""
    template = how.template
    description = asdict(attr)
    for name in _WHERE:
        description.pop(name)
    description |= {
        "columns": attr.columns.model_dump(),
        "tags": attr.tags.model_dump(),
        "named": sorted(attr.named),
    }
    rows = {
        "code": [CODE_VERSION, __version__],
        "data": data_fingerprint(attr, how.hub_cache, how.hub_token),
        "format": description,
        "kind": how.kind,
        "rows": [spec.max_samples, how.seed if attr.num_samples is not None else None],
    }
    stamps = None
    if isinstance(template, MediaTemplate):
        index = _cache(spec).folder / f"media-{content_key(rows)}.json"
        stamps = media_stamps(index, Path(attr.media_directory or ""), partial(_media_named, attr, spec, how))
    return content_key({**rows, "template": template.fingerprint, "encode": how.identity, "media": stamps})


def _media_named(attr: DatasetAttr, spec: DataSpec, how: Preparation) -> Iterator[Source]:
    """The media of all rows that can be used, as the rows name them."""
    plain = replace(attr, media_directory=None)
    rng = np.random.RandomState(how.seed)
    for raw in read_rows(
        attr, max_samples=spec.max_samples, rng=rng, cache_dir=how.hub_cache, token=how.hub_token
    ):
        try:
            found = media_of(to_row(raw, plain, how.kind).conversation)
        except RowError:
            continue  # counted when the rows are encoded
        yield from (one.source for one in found)


def _cache(spec: DataSpec) -> TokenCache:
    return TokenCache(Path(spec.cache).expanduser() if spec.cache else default_folder())


def _one_dataset(
    attr: DatasetAttr, spec: DataSpec, how: Preparation, cache: TokenCache, progress: Progress | None
) -> tuple[SampleTable, DataReport, str]:
    require_kind(attr, how.kind, how.identity.get("stage", how.kind))
    key = cache_key(attr, spec, how)
    found = cache.get(key, attr.name)
    if found is None:
        rng = np.random.RandomState(how.seed)
        rows = unread_rows(
            attr, max_samples=spec.max_samples, rng=rng, cache_dir=how.hub_cache, token=how.hub_token
        )
        encode = EncodeBatch(attr, how)

        def parts(folder: Path) -> Iterator[CountedPart]:
            batches = encode_batches(
                encode, row_batches(rows, slow=how.opener is not None), spec.workers, folder
            )
            return _told(batches, SeenColumns(attr), attr.name, progress)

        found = cache.store(key, attr.name, parts)
    else:
        attr.check_sha1()  # which reading the rows does otherwise
    return *found, key


def _told(
    batches: Iterable[EncodedBatch], columns: SeenColumns, name: str, progress: Progress | None
) -> Iterator[CountedPart]:
    """The parts of the batches, with the progress; raises DataError at their end as `SeenColumns` does."""
    done = 0
    for batch in batches:
        columns.add(batch.columns)
        yield from batch.parts
        done += batch.rows
        if progress is not None:
            progress(name, done)
    columns.check()


def _arranged(table: SampleTable, spec: DataSpec, how: Preparation) -> SampleTable:
    """The table with the groups that packing asks for."""
    if not spec.packing or not len(table):
        return table
    if not how.llamafactory:
        pack = best_fit if spec.shuffle else in_order
        return table.with_groups(pack(table.lengths.tolist(), spec.max_length))
    bounds = np.searchsorted(
        table.rows, np.arange(0, int(table.rows[-1]) + 1 + _MAP_BATCH, _MAP_BATCH)
    ).tolist()
    parts = [range(a, b) for a, b in pairwise(bounds)]
    if how.kind == "text":
        first_id = next(iter(how.template.begin_ids), None)
        cut = [
            block
            for part in parts
            for block in blocks(table[part.start : part.stop], spec.max_length, first_id=first_id)
        ]
        return SampleTable.of_mixed(cut)
    groups = [
        [part.start + i for i in group]
        for part in parts
        for group in greedy_groups(table.lengths[part.start : part.stop].tolist(), spec.max_length)
    ]
    return table.with_groups(groups)


def _require_names(spec: DataSpec, names: Sequence[str]) -> None:
    """Raise DataError, before anything is read, where the mixture names other sets than there are."""
    check_mix(spec.mix, names, [1] * len(names))


def _no_twins(names: Sequence[str], key: str) -> None:
    twins = sorted({name for name in names if names.count(name) > 1})
    if twins:
        raise DataError(f"{key}: two data sets are called {twins[0]!r}; give one of them another name")
