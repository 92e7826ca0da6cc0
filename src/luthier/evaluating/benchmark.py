"""Multiple-choice benchmarks from local files, in the layout of MMLU, C-Eval and CMMLU.

read_benchmark(folder, task)  ->  Benchmark

`folder`/NAME/mapping.json names the subjects, {"subject": {"name": ..., "category": ...}}. The questions of a subject
and split are one CSV file, in a folder or a .zip archive there: SPLIT/SUBJECT_SPLIT.csv or SPLIT/SUBJECT.csv, the
splits called dev (or train), val (or validation) and test. A file has a header with question, A, B, C, D and answer,
whatever their case and whatever else is there, or none and these six columns in this order.
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from luthier.types import DataError

LETTERS = ("A", "B", "C", "D")
SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("dev", "train"),
    "validation": ("val", "validation"),
    "test": ("test",),
}
"""Splits by the names that tasks end with, and what files call them."""
SHOTS = "train"
"""The split that examples are taken from."""


@dataclass(frozen=True, slots=True)
class Question:
    """`place` names its file and row; `choices` are the texts of A to D, `answer` one of these letters."""

    place: str
    text: str
    choices: tuple[str, ...]
    answer: str


@dataclass(frozen=True, slots=True)
class Subject:
    name: str
    title: str
    category: str
    questions: Sequence[Question]
    shots: Sequence[Question]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """The questions of one split, by subject, each with the examples that may precede them."""

    task: str
    subjects: Sequence[Subject]


_File = tuple[str, Callable[[], bytes]]
"""What a file is called in messages, and its content."""


def read_benchmark(folder: Path, task: str, *, num_shots: int, limit: int | None = None) -> Benchmark:
    """The questions of `task`, a name and a split as in `mmlu_test`; at most `limit` of each subject.

    Raises DataError that names the folder, file or row for what is missing or is not as described above.
    """
    name, _, split = task.rpartition("_")
    if not name or split not in SPLITS:
        known = ", ".join(f"NAME_{one}" for one in SPLITS)
        raise DataError(f"--task {task}: expected a benchmark and its split ({known}), as in mmlu_test")
    root = folder / name
    subjects = _mapping(root / "mapping.json")
    files = _index(root)
    found = []
    for subject, (title, category) in subjects.items():
        questions = list(_questions(*_file(files, root, subject, split), split))[:limit]
        shots: list[Question] = []
        if num_shots:
            shots = list(_questions(*_file(files, root, subject, SHOTS), SHOTS))[:num_shots]
        found.append(Subject(subject, title, category, questions, shots))
    return Benchmark(task, found)


def _mapping(file: Path) -> dict[str, tuple[str, str]]:
    if not file.is_file():
        raise DataError(
            f"{file} does not exist: --task-dir is the folder that holds one folder for each benchmark, with "
            "mapping.json and the CSV files of its subjects"
        )
    try:
        tree = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise DataError(f"{file}: not JSON: {error}") from error
    if not isinstance(tree, dict) or not tree:
        raise DataError(f"{file}: expected an object of subjects, found {type(tree).__name__}")
    found = {}
    for subject, entry in tree.items():
        if not isinstance(entry, Mapping) or not {"name", "category"} <= entry.keys():
            raise DataError(f'{file}: {subject}: expected {{"name": ..., "category": ...}}')
        found[subject] = (str(entry["name"]), str(entry["category"]))
    return found


def _index(root: Path) -> dict[tuple[str, str], _File]:
    """The CSV files below a folder and in its archives, by split and stem."""
    found: dict[tuple[str, str], _File] = {}
    aliases = {alias: split for split, names in SPLITS.items() for alias in names}

    def put(path: PurePosixPath, label: str, read: Callable[[], bytes]) -> None:
        if path.suffix.lower() == ".csv" and path.parent.name in aliases:
            found.setdefault((aliases[path.parent.name], path.stem), (label, read))

    for file in sorted(root.rglob("*.csv")):
        put(PurePosixPath(file.relative_to(root).as_posix()), str(file), file.read_bytes)
    for archive in sorted(root.glob("*.zip")):
        try:
            names = zipfile.ZipFile(archive).namelist()
        except zipfile.BadZipFile as error:
            raise DataError(f"{archive}: not a zip archive: {error}") from error
        for name in names:
            put(PurePosixPath(name), f"{archive}: {name}", _Member(archive, name))
    return found


@dataclass(frozen=True, slots=True)
class _Member:
    archive: Path
    name: str

    def __call__(self) -> bytes:
        with zipfile.ZipFile(self.archive) as archive:
            return archive.read(self.name)


def _file(files: Mapping[tuple[str, str], _File], root: Path, subject: str, split: str) -> _File:
    for stem in (*(f"{subject}_{alias}" for alias in SPLITS[split]), subject):
        if (split, stem) in files:
            return files[split, stem]
    folder = SPLITS[split][0]
    raise DataError(
        f"{root}: no questions of {subject!r}, split {split}: expected {folder}/{subject}_{folder}.csv or "
        f"{folder}/{subject}.csv in the folder or in a .zip archive there"
    )


def _questions(label: str, read: Callable[[], bytes], split: str) -> Iterator[Question]:
    try:
        text = read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{label}: not UTF-8 at byte {error.start}; convert it to UTF-8") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns: list[int] | None = None
    try:
        for cells in reader:
            place = f"{label}, line {reader.line_num}"
            if not any(cells):
                continue
            if columns is None:
                columns, is_header = _columns(cells, place)
                if is_header:
                    continue
            yield _question(cells, columns, place, split)
    except csv.Error as error:
        raise DataError(f"{label}, line {reader.line_num}: not CSV: {error}") from error


def _columns(first: Sequence[str], place: str) -> tuple[list[int], bool]:
    """Where question, choices and answer stand, and whether the first row says so."""
    names = [cell.strip().lower() for cell in first]
    wanted = ["question", *(letter.lower() for letter in LETTERS), "answer"]
    if all(name in names for name in wanted[:-1]):
        return [names.index(name) if name in names else -1 for name in wanted], True
    if len(first) != len(wanted):
        raise DataError(
            f"{place}: expected the columns question, A, B, C, D, answer by a header or in this order; found "
            f"{len(first)} columns"
        )
    return list(range(len(wanted))), False


def _question(cells: Sequence[str], columns: Sequence[int], place: str, split: str) -> Question:
    if max(columns) >= len(cells):
        raise DataError(f"{place}: {len(cells)} cells, and {max(columns) + 1} are expected")
    values: list[Any] = [cells[at] if at >= 0 else "" for at in columns]
    answer = values[-1].strip()
    if answer not in LETTERS:
        hint = ": the answers of this split are not in the file" if not answer else ""
        others = " or ".join(one for one in ("validation", "test") if one != split)
        advice = f"{hint}; evaluate on another split ({others})" if hint else ""
        raise DataError(f"{place}: the answer should be A, B, C or D, found {answer!r}{advice}")
    return Question(place, values[0], tuple(values[1:-1]), answer)
