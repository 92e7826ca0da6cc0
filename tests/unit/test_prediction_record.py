"""Predictions on disk: lines as they come, torn ends, other predictions, order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from luthier.predicting.record import (
    IDENTITY_NAME,
    LINES_NAME,
    Prediction,
    PredictionRecord,
    find_predictions,
    read_predictions,
)
from luthier.predicting.results import require_same_rows
from luthier.types import CheckpointError, DataError

IDENTITY = {"model": {"base": "sha256:1", "dtype": "float32"}, "data": [{"name": "a", "data": "1"}]}


def made(index: int, predict: str = "said") -> Prediction:
    return Prediction(f"ask {index}", predict, f"label {index}", index, "a", index, "stop", 3)


def write(folder: Path, *indices: int) -> None:
    with PredictionRecord(folder, IDENTITY) as record:
        for index in indices:
            record.add(made(index))


def test_lines_are_with_the_system_as_they_are_added_and_in_order_at_the_end(tmp_path: Path) -> None:
    with PredictionRecord(tmp_path / "new", IDENTITY) as record:
        for index in (2, 0):
            record.add(made(index))
        lines = (tmp_path / "new" / LINES_NAME).read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["index"] for line in lines] == [2, 0]
        record.add(made(1, "é 北京 \u2028 \n"))
        assert [one.index for one in record.put_in_order()] == [0, 1, 2]
    assert read_predictions(tmp_path / "new" / LINES_NAME) == [made(0), made(1, "é 北京 \u2028 \n"), made(2)]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [LINES_NAME, IDENTITY_NAME]


@pytest.mark.parametrize("cut", [1, 2, 20, 60])
def test_a_torn_last_line_is_made_again(tmp_path: Path, cut: int) -> None:
    write(tmp_path, 0, 1)
    file = tmp_path / LINES_NAME
    file.write_bytes(file.read_bytes()[:-cut])
    with PredictionRecord(tmp_path, IDENTITY) as record:
        assert set(record.done) == {0}
        record.add(made(1))
        assert read_predictions(file) == [made(0), made(1)], "a second kill finds no torn line in the middle"
        record.put_in_order()
    assert read_predictions(file) == [made(0), made(1)]


def test_a_line_damaged_in_the_middle_is_named(tmp_path: Path) -> None:
    write(tmp_path, 0, 1)
    file = tmp_path / LINES_NAME
    file.write_text("{nothing\n" + file.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(DataError, match=r"generated_predictions\.jsonl, line 1 is no prediction"):
        PredictionRecord(tmp_path, IDENTITY)


def test_a_row_that_is_there_twice_is_named(tmp_path: Path) -> None:
    write(tmp_path, 0, 0)
    with pytest.raises(DataError, match="line 2: row 0 is there twice"):
        PredictionRecord(tmp_path, IDENTITY)


def test_another_prediction_is_refused_and_named_then_replaced(tmp_path: Path) -> None:
    write(tmp_path, 0)
    before = (tmp_path / LINES_NAME).read_bytes()
    other = {**IDENTITY, "model": {"base": "sha256:1", "dtype": "bfloat16"}}
    with pytest.raises(CheckpointError, match=r'model\.dtype was "float32" and is "bfloat16".*--overwrite'):
        PredictionRecord(tmp_path, other)
    assert (tmp_path / LINES_NAME).read_bytes() == before
    with PredictionRecord(tmp_path, other, overwrite=True) as record:
        assert not record.done
    assert json.loads((tmp_path / IDENTITY_NAME).read_text(encoding="utf-8")) == other


def test_lines_of_nobody_knows_what_are_not_added_to(tmp_path: Path) -> None:
    (tmp_path / LINES_NAME).write_text(made(0).line(), encoding="utf-8")
    with pytest.raises(CheckpointError, match="nothing beside it says which prediction"):
        PredictionRecord(tmp_path, IDENTITY)


def test_a_damaged_identity_is_named(tmp_path: Path) -> None:
    write(tmp_path, 0)
    (tmp_path / IDENTITY_NAME).write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"prediction\.json is damaged"):
        PredictionRecord(tmp_path, IDENTITY)


def test_predictions_of_another_tool_are_numbered_by_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "theirs.jsonl"
    rows = [{"prompt": "a", "predict": "b", "label": "c"}, {"prompt": "d", "predict": "e", "label": "f"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert [(one.index, one.prompt, one.predict) for one in read_predictions(file)] == [
        (0, "a", "b"),
        (1, "d", "e"),
    ]


def test_predictions_are_found_by_file_folder_and_run(tmp_path: Path) -> None:
    write(tmp_path / "run" / "predictions", 0)
    file = tmp_path / "run" / "predictions" / LINES_NAME
    assert [find_predictions(path) for path in (file, file.parent, tmp_path / "run")] == [file] * 3
    with pytest.raises(DataError, match="no predictions there"):
        find_predictions(tmp_path)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([made(0)], "it has 1 and these are 2; row 1 is only in these predictions"),
        ([made(0), made(2)], "row 1 is only in these predictions"),
        ([made(0), Prediction("other", "said", "label 1", 1)], "row 1 has another prompt there, 'other'"),
        ([made(0), Prediction("ask 1", "said", "other", 1)], "row 1 has another label there"),
    ],
)
def test_other_rows_are_not_compared(others: list[Prediction], message: str) -> None:
    with pytest.raises(DataError, match=message):
        require_same_rows([made(0), made(1)], Path("other.jsonl"), others)
