"""The order of rows of a stream, from its beginning and from any state on."""

from __future__ import annotations

import csv
import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st

from luthier.data.mixing import turns
from luthier.data.read import read_rows
from luthier.data.row_stream import RowStream, StreamOrder
from luthier.data.seeking import open_cursor
from luthier.recipe.mixture import MixSpec
from luthier.types import DataError
from tests.streams import sets_of, write_lines


def drained(rows: RowStream, count: int) -> list[tuple[int, int, int]]:
    """Epoch, set and row of the next rows."""
    found = []
    for _ in range(count):
        if rows.finished:
            rows.next_epoch()
        row = rows.take()
        found.append((rows.epoch, row.set, row.index))
    return found


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_goes_on_from_any_state(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Buffers smaller and larger than the sets, mixtures of every kind, sets that end in the middle of an epoch."""
    folder = tmp_path_factory.mktemp("order")
    sizes = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=3))
    sets = sets_of(*(write_lines(folder / f"{i}.jsonl", size) for i, size in enumerate(sizes)))
    mixes = [
        MixSpec(),
        MixSpec(strategy="interleave", until="all"),
        MixSpec(strategy="interleave", until="first"),
        MixSpec(strategy="interleave", probabilities=[1 / len(sizes)] * len(sizes), until="all"),
        MixSpec(weights={one.attr.name: 1.0 + i for i, one in enumerate(sets)}),
        MixSpec(counts={one.attr.name: 7 * (1 + i) for i, one in enumerate(sets)}),
    ]
    mix = data.draw(st.sampled_from(mixes))
    order = StreamOrder(sets, mix, data.draw(st.integers(0, 5)), data.draw(st.integers(1, 40)))
    at, more = data.draw(st.integers(0, 90)), 60
    whole = drained(RowStream(order), at + more)
    first = RowStream(order)
    assert drained(first, at) == whole[:at]
    state = json.loads(json.dumps(first.state()))
    assert drained(RowStream(order, state), more) == whole[at:]
    assert drained(first, more) == whole[at:]  # to ask for the state changes nothing


def test_an_epoch_has_every_row_once_and_its_own_order(tmp_path: Path) -> None:
    sets = sets_of(write_lines(tmp_path / "a.jsonl", 2500), write_lines(tmp_path / "b.jsonl", 700))
    rows = drained(RowStream(StreamOrder(sets, seed=3, buffer=64)), 6400)
    epochs = [[row[1:] for row in rows if row[0] == epoch] for epoch in (0, 1)]
    every = Counter([(0, i) for i in range(2500)] + [(1, i) for i in range(700)])
    assert Counter(epochs[0]) == Counter(epochs[1]) == every
    assert epochs[0] != epochs[1]
    assert epochs[0] == [row[1:] for row in drained(RowStream(StreamOrder(sets, seed=3, buffer=64)), 3200)]
    assert epochs[0] != [row[1:] for row in drained(RowStream(StreamOrder(sets, seed=4, buffer=64)), 3200)]
    # a row comes at most 63 places before its turn, and the buffer is what it is delayed by on average
    late = [place - index for place, (number, index) in enumerate(epochs[0]) if number == 0]
    assert min(late) >= -63
    assert max(late) > 64


def test_a_buffer_of_one_is_the_order_of_the_mixture(tmp_path: Path) -> None:
    sets = sets_of(write_lines(tmp_path / "a.jsonl", 9), write_lines(tmp_path / "b.jsonl", 5))
    mix = MixSpec(strategy="interleave", weights={"a": 2.0, "b": 1.0}, until="once")
    found = [number for _, number, _ in drained(RowStream(StreamOrder(sets, mix)), 14)]
    counts, expected = [9, 5], []
    generator = turns(mix, ["a", "b"], None, seed=0, epoch=0)
    turn = next(generator)
    while True:
        expected.append(turn)
        counts[turn] -= 1
        try:
            turn = next(generator) if counts[turn] else generator.send(turn)
        except StopIteration:
            break
    assert found == expected
    assert sorted(found) == [0] * 9 + [1] * 5


def test_a_uniform_draw(tmp_path: Path) -> None:
    """The first row of an epoch is any of the buffer's, over many seeds."""
    sets = sets_of(write_lines(tmp_path / "a.jsonl", 20))
    counts = Counter(RowStream(StreamOrder(sets, seed=seed, buffer=4)).take().index for seed in range(400))
    assert set(counts) == {0, 1, 2, 3}
    assert all(70 <= times <= 130 for times in counts.values())  # 100 each; 3.5 standard deviations


def test_the_state_is_small_and_reads_on_behind_the_oldest_row(tmp_path: Path) -> None:
    sets = sets_of(write_lines(tmp_path / "a.jsonl", 6000))
    stream = RowStream(StreamOrder(sets, buffer=50))
    drained(stream, 5500)
    state = stream.state()
    assert len(json.dumps(state)) < 1200
    (mark,) = state["marks"]
    assert (
        mark[0] == 5000 or mark[0] == 4000
    )  # rows given before: by thousands, behind the oldest that is held
    assert mark[2][1] > 4000 * 10  # a place in bytes


def test_a_shorter_file_is_noticed(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", 40)
    stream = RowStream(StreamOrder(sets_of(file), buffer=5))
    drained(stream, 30)
    state = stream.state()
    write_lines(file, 20)
    with pytest.raises(DataError, match="is not what it was when the checkpoint was written"):
        RowStream(StreamOrder(sets_of(file), buffer=5), state)


def _written(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    file = folder / f"rows.{kind.split('-')[0]}"
    if kind == "jsonl":
        file.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(map(json.dumps, rows)).encode())
    elif kind == "json-list":
        file.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    elif kind == "json-lines":
        file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    elif kind == "csv":
        with file.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, ["text", "n"])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "txt":
        file.write_bytes(
            b"".join(f"{row['n']} ä\n".encode() + (b"\r\n" if row["n"] % 3 else b"") for row in rows)
        )
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=7)
    else:
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(file), "wb") as sink:
            new = pa.ipc.new_stream if kind == "arrow-stream" else pa.ipc.new_file
            with new(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=9)
    return file


KINDS = ["jsonl", "json-list", "json-lines", "csv", "txt", "parquet", "arrow", "arrow-stream"]


@pytest.mark.parametrize("kind", KINDS)
def test_any_place_of_any_format_as_it_is_read_whole(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luthier.data.seeking._CHUNK", 64)  # a list of pieces, cut in the middle of a row
    rows = [{"text": f'row {i}, "ä", [1],\n two', "n": i} for i in range(31)]
    (one,) = sets_of(_written(tmp_path, kind, rows))
    # A text file says nothing of its columns.
    whole = [(raw.place, dict(raw.columns)) for raw in read_rows(one.attr)]
    places = [open_cursor(one.attr).place()]
    cursor = open_cursor(one.attr)
    found = []
    for row in cursor:
        found.append((row.place, dict(row.parsed())))
        places.append(json.loads(json.dumps(cursor.place())))
    assert found == whole
    for at in (0, 1, 7, 8, 17, 30, 31):
        again = [(row.place, dict(row.parsed())) for row in islice(open_cursor(one.attr, places[at]), 5)]
        assert again == whole[at : at + 5]


def test_an_iterable_of_datasets(tmp_path: Path) -> None:
    """Read through the library's own streaming, whose state the place is."""
    folder = tmp_path / "hub"
    folder.mkdir()
    for i in range(2):
        write_lines(folder / f"part-{i}.jsonl", 20, name=f"{i}-")
    from luthier.data.registry import resolve_datasets
    from luthier.data.row_stream import StreamSet
    from luthier.recipe.schema import DataSpec

    spec = DataSpec(train=({"hf_hub_url": str(folder), "columns": {"prompt": "text"}},))  # type: ignore[arg-type]
    sets = [StreamSet(attr) for attr in resolve_datasets(spec.train, spec)]
    order = StreamOrder(sets, buffer=8)
    whole, rows = drained(RowStream(order), 70), RowStream(order)
    drained(rows, 33)
    state = json.loads(json.dumps(rows.state()))
    assert drained(RowStream(order, state), 37) == whole[33:]
    texts = [row.parsed()["text"] for row in sets[0].open()]
    assert texts == [f"{i}-{k}" for i in range(2) for k in range(20)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"text": "1"}\n{"text": \n', "a.jsonl, line 2, column 1. not JSON: Expecting value"),
        ("a.jsonl", '{"text": "1"}\n[1]\n', "a.jsonl, line 2: expected an object with columns, found list"),
        ("a.json", '[{"text": "1"}, {"text" 2}]', "a.json, row 1: not JSON: Expecting ':' delimiter"),
        ("a.json", '[{"text": "1"}, {"te', "a.json, row 1: not JSON: Unterminated string"),
        ("a.json", '{\n "text": "1"}\n', "a.json: expected a list of rows, or one row on each line"),
        ("a.csv", 'text\n"1', "a.csv, line 2: not CSV"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    (one,) = sets_of(tmp_path / name)
    with pytest.raises(DataError, match=message):
        [row.parsed() for row in one.open()]


def test_text_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"text": "1"}\n{"text": "\xe4"}\n'.encode("latin-1"))
    (tmp_path / "a.txt").write_bytes("eins\nä\n".encode("latin-1"))
    for file in ("a.jsonl", "a.txt"):
        (one,) = sets_of(tmp_path / file)
        with pytest.raises(DataError, match=rf"{file}, line 2: not UTF-8"):
            [row.parsed() for row in one.open()]


def test_an_empty_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data set 'a': .*a.jsonl has no rows"):
        RowStream(StreamOrder(sets_of(write_lines(tmp_path / "a.jsonl", 0))))
