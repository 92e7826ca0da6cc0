"""Names and files -> described data sets: as a run describes them, as dataset_info.json does, or by their columns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from luthier.data.described import data_sets, describe, is_in
from luthier.data.read import read_rows
from luthier.data.registry import DatasetAttr, resolve_datasets
from luthier.evaluating.sets import kind_of
from luthier.recipe.schema import ColumnSpec, DataSpec, Recipe
from luthier.types import RowKind

_NOT_TEXT = {"messages", "conversations", "instruction", "prompt", "chosen"}


def described(name: str, run: Recipe | None) -> tuple[DatasetAttr, RowKind]:
    """What `name` means and what it is read as. Raises DataError for what is neither a name nor a file, and for columns
    that hold neither text nor answers."""
    spec = run.data if run is not None else DataSpec()
    for attr in data_sets(spec):
        if name == attr.name or is_in(attr, Path(name)):
            return attr, kind_of(attr, run)
    (attr,) = resolve_datasets([name], spec)
    places = (Path(name), Path(spec.directory) / name)
    if attr.load_from == "file" and not attr.named and any(is_in(attr, place) for place in places):
        attr = _by_columns(attr)
    return attr, kind_of(attr, None)


def _by_columns(attr: DatasetAttr) -> DatasetAttr:
    if Path(attr.path).suffix.lower() == ".txt":
        return attr
    columns = next(read_rows(attr, max_samples=1)).columns
    if isinstance(columns.get("text"), str) and not _NOT_TEXT & columns.keys():
        return replace(attr, columns=ColumnSpec(prompt="text"))
    return describe(Path(attr.path))
