"""Predictions on disk: a line for each as it is made, so that a killed process has lost only what was under way.

The folder holds `generated_predictions.jsonl` and `prediction.json`, which says what was asked of what: another model,
other data or settings are refused there instead of mixed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from luthier.files import write_whole
from luthier.trained.source import json_object
from luthier.types import CheckpointError, DataError

LINES_NAME = "generated_predictions.jsonl"
IDENTITY_NAME = "prediction.json"
RESULTS_NAME = "predict_results.json"


@dataclass(frozen=True, slots=True)
class Prediction:
    """An answer beside the one that the data has. `finish` is why it ended (see `generation.Finish`), `tokens` counts
    it, `bad_scores` its steps at which the model's scores were no numbers."""

    prompt: str
    predict: str
    label: str
    index: int
    dataset: str = ""
    row: int = -1
    finish: str = ""
    tokens: int = 0
    bad_scores: int = 0

    def line(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


_FIELDS = {one.name for one in fields(Prediction)}


class PredictionRecord:
    """The predictions of one folder; a context manager around making them.

    done: those that there were, by index.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Raises CheckpointError where the folder holds another prediction and `overwrite` does not say to replace it,
        or where its lines are damaged other than by a torn end."""
        self.folder, self._identity = folder, dict(identity)
        self.file = folder / LINES_NAME
        self._stream: IO[str] | None = None
        known = folder / IDENTITY_NAME
        if overwrite:
            for name in (RESULTS_NAME, LINES_NAME, IDENTITY_NAME):
                (folder / name).unlink(missing_ok=True)
        elif known.is_file():
            self._require_same(known)
        elif self.file.exists():
            raise CheckpointError(
                f"{self.file} is in the way: nothing beside it says which prediction it is of; choose another folder "
                "(--output) or give --overwrite"
            )
        self._torn = _repaired_end(self.file) if self.file.exists() else None
        found = read_predictions(self.file, self._torn) if self.file.exists() else []
        self.done = {one.index: one for one in found}

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / IDENTITY_NAME).exists():
            text = json.dumps(self._identity, indent=2, ensure_ascii=False) + "\n"
            write_whole(self.folder / IDENTITY_NAME, text)
        if self._torn is not None:
            with self.file.open("r+b") as stream:
                stream.truncate(self._torn)
        self._stream = self.file.open("a", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.close()

    def add(self, prediction: Prediction) -> None:
        """Write one; the system has it when this returns."""
        assert self._stream is not None
        self._stream.write(prediction.line())
        self._stream.flush()
        self.done[prediction.index] = prediction

    def put_in_order(self) -> list[Prediction]:
        """All of them in the order of their rows, in the file too."""
        ordered = [self.done[index] for index in sorted(self.done)]
        write_whole(self.file, "".join(one.line() for one in ordered))
        return ordered

    def _require_same(self, file: Path) -> None:
        try:
            before = json_object(file)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; give --overwrite to begin anew") from error
        now = json.loads(json.dumps(self._identity))
        different = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        if different:
            words = "; ".join(_difference(key, before.get(key), now.get(key)) for key in different)
            raise CheckpointError(
                f"{self.folder} holds another prediction: {words}. Choose another folder (--output), or give "
                "--overwrite to replace it"
            )


def _difference(key: str, before: Any, now: Any) -> str:
    """What differs in a few words: values where they are short, else only their names."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
        return "; ".join(_difference(f"{key}.{name}", before.get(name), now.get(name)) for name in names)
    texts = [json.dumps(value, ensure_ascii=False) for value in (before, now)]
    if max(map(len, texts)) > 80:
        return f"{key} is another"
    return f"{key} was {texts[0]} and is {texts[1]}"


def _repaired_end(file: Path) -> int | None:
    """Where a last line that a killed writer left half written begins; None where the file ends whole."""
    with file.open("rb") as stream:
        content = stream.read()
    return None if not content or content.endswith(b"\n") else content.rfind(b"\n") + 1


def read_predictions(file: Path, end: int | None = None) -> list[Prediction]:
    """The predictions in the first `end` bytes of a file, this one's or another tool's with prompt, predict and label.

    Raises DataError for a file that is not there or a line that is no prediction, naming it.
    """
    try:
        lines = file.read_bytes()[:end].split(b"\n")
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    found: dict[int, Prediction] = {}
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            tree = json.loads(line.decode("utf-8"))
            prediction = Prediction(
                **{"index": number, **{key: value for key, value in tree.items() if key in _FIELDS}}
            )
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"{file}, line {number + 1} is no prediction (a JSON object with prompt, predict and label): {error}"
            ) from error
        if prediction.index in found:
            raise DataError(f"{file}, line {number + 1}: row {prediction.index} is there twice")
        found[prediction.index] = prediction
    return list(found.values())


def find_predictions(where: Path) -> Path:
    """The file of predictions that a path names: itself, that of its folder, or that of a run's folder.

    Raises DataError where there is none.
    """
    for file in (where, where / LINES_NAME, where / "predictions" / LINES_NAME):
        if file.is_file():
            return file
    raise DataError(
        f"{where}: no predictions there; name a {LINES_NAME}, its folder, or a run that `luthier predict` answered with"
    )
