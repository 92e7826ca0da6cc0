"""Names and files -> described data sets: as a run describes them, as dataset_info.json does, or by their columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from luthier.data.described import describe
from luthier.data.read import read_rows
from luthier.data.registry import DatasetAttr, resolve_datasets
from luthier.evaluating.sets import kind_of
from luthier.recipe.schema import ColumnSpec, DataSpec, Recipe
from luthier.types import DataError, RowKind

_NOT_TEXT = {"messages", "conversations", "instruction", "prompt", "chosen"}


def described(name: str, run: Recipe | None) -> tuple[DatasetAttr, RowKind]:
    """What `name` means and what it is read as. Raises DataError for what is neither a name nor a file, and for columns
    that hold neither text nor answers."""
    spec = run.data if run is not None else DataSpec()
    for attr in _of_run(spec):
        if name == attr.name or _is_file(attr, Path(name)):
            return attr, kind_of(attr, run)
    (attr,) = resolve_datasets([name], spec)
    places = (Path(name), Path(spec.directory) / name)
    if attr.load_from == "file" and not attr.named and any(_is_file(attr, place) for place in places):
        attr = _by_columns(attr)
    return attr, kind_of(attr, None)


def _is_file(attr: DatasetAttr, path: Path) -> bool:
    return attr.load_from == "file" and path.is_file() and Path(attr.path).resolve() == path.resolve()


def _of_run(spec: DataSpec) -> Iterator[DatasetAttr]:
    """The sets of a run that can still be found."""
    for ref in (*spec.eval, *spec.train):
        try:
            yield from resolve_datasets([ref], spec)
        except DataError:
            continue


def _by_columns(attr: DatasetAttr) -> DatasetAttr:
    if Path(attr.path).suffix.lower() == ".txt":
        return attr
    columns = next(read_rows(attr, max_samples=1)).columns
    if isinstance(columns.get("text"), str) and not _NOT_TEXT & columns.keys():
        return replace(attr, columns=ColumnSpec(prompt="text"))
    return describe(Path(attr.path))
