"""A data file that nobody described: as the recipe's own data sets say of it, else by the names of its columns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from luthier.data.read import read_rows
from luthier.data.registry import DatasetAttr, resolve_datasets
from luthier.recipe.schema import ColumnSpec, DatasetSpec, DataSpec
from luthier.types import DataError

_PROMPTS, _ANSWERS = ("instruction", "prompt", "question"), ("output", "response", "completion", "answer")


def described(file: Path, data: DataSpec) -> DatasetAttr:
    """What the columns of a data file mean: as a data set of the recipe says of it, or by their names.

    Raises DataError as `describe` does.
    """
    return next((attr for attr in data_sets(data) if is_in(attr, file)), None) or describe(file)


def data_sets(data: DataSpec) -> Iterator[DatasetAttr]:
    """The data sets of a recipe that can still be found."""
    for ref in (*data.train, *data.eval):
        with contextlib.suppress(DataError):
            yield from resolve_datasets([ref], data)


def is_in(attr: DatasetAttr, file: Path) -> bool:
    """Whether `file` is where a data set is read from."""
    return attr.load_from == "file" and file.is_file() and Path(attr.path).resolve() == file.resolve()


def describe(file: Path) -> DatasetAttr:
    """A data file's format, told from the columns of its first row.

    Raises DataError for a file that cannot be read, and for columns that hold no answers by their names.
    """
    (bare,) = resolve_datasets([DatasetSpec(file_name=str(file.absolute()))], DataSpec())
    columns = next(read_rows(bare, max_samples=1)).columns
    ranking = {"chosen", "rejected"} <= columns.keys()
    named = {name: name for name in ("chosen", "rejected") if ranking}
    others = ("system", "tools", "history", "images", "videos", "audios")
    named |= {name: name for name in others if name in columns}
    lists = [name for name in ("messages", "conversations", "prompt") if isinstance(columns.get(name), list)]
    fields: dict[str, Any] = {"file_name": str(file.absolute()), "ranking": ranking}
    if lists or (ranking and not isinstance(columns["chosen"], str)):
        named.pop("history", None)
        named |= {"messages": lists[0]} if lists else {}
        shown = columns[lists[0]] if lists else columns["chosen"]
        turn = shown[0] if isinstance(shown, list) and shown else shown
        fields["formatting"] = "openai" if isinstance(turn, Mapping) and "role" in turn else "sharegpt"
    else:
        prompt = next((name for name in _PROMPTS if name in columns), None)
        answer = next((name for name in _ANSWERS if name in columns), None)
        if prompt is None or (answer is None and not ranking):
            raise DataError(
                f"{file}: no answers in its columns ({', '.join(columns)}). Expected are messages or "
                f"conversations; or a prompt ({', '.join(_PROMPTS)}) with an answer ({', '.join(_ANSWERS)}) or with "
                "chosen and rejected"
            )
        named |= {"prompt": prompt} | ({"response": answer} if answer is not None and not ranking else {})
    beside = DataSpec(directory=str(file.absolute().parent))  # where its images are looked for
    (attr,) = resolve_datasets([DatasetSpec(**fields, columns=ColumnSpec(**named))], beside)
    return attr
