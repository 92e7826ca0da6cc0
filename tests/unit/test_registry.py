"""Names -> descriptions -> raw rows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from luthier.data.read import data_fingerprint, read_rows
from luthier.data.registry import DatasetAttr, resolve_datasets
from luthier.recipe.schema import ColumnSpec, DatasetSpec, DataSpec, TagSpec
from luthier.types import DataError

ROWS = [
    {"instruction": "a", "output": "1"},
    {"instruction": "b", "output": "2"},
    {"instruction": "c", "output": "3"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    return tmp_path


def info(folder: Path, **entries: Any) -> None:
    (folder / "dataset_info.json").write_text(json.dumps(entries))


def resolve(folder: Path, *names: str | DatasetSpec) -> list[DatasetAttr]:
    return resolve_datasets(names, DataSpec(directory=str(folder)))


def columns(attr: DatasetAttr, **kwargs: Any) -> list[dict[str, Any]]:
    return [dict(row.columns) for row in read_rows(attr, **kwargs)]


def test_an_entry_without_columns_has_the_formats_own(folder: Path) -> None:
    info(folder, demo={"file_name": "rows.json"}, chat={"file_name": "rows.json", "formatting": "sharegpt"})
    demo, chat = resolve(folder, "demo", "chat")
    assert demo.path == str(folder / "rows.json") and demo.load_from == "file" and demo.formatting == "alpaca"
    assert demo.columns == ColumnSpec(prompt="instruction", query="input", response="output")
    assert chat.columns == ColumnSpec(messages="conversations") and chat.tags == TagSpec()


def test_an_entry_with_columns_has_only_those(folder: Path) -> None:
    info(folder, demo={"file_name": "rows.json", "columns": {"prompt": "instruction"}})
    assert resolve(folder, "demo")[0].columns == ColumnSpec(prompt="instruction")


def test_a_description_in_the_recipe_keeps_the_other_columns(folder: Path) -> None:
    spec = DatasetSpec(file_name="rows.json", columns=ColumnSpec(prompt="question"))
    (attr,) = resolve(folder, spec)
    assert attr.name == "rows"
    assert attr.columns == ColumnSpec(prompt="question", query="input", response="output")


def test_tags_that_are_not_named_keep_the_formats_own(folder: Path) -> None:
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    info(
        folder,
        shared={"file_name": "rows.json", "formatting": "sharegpt", "tags": tags},
        openai={"file_name": "rows.json", "formatting": "openai"},
    )
    shared, openai = resolve(folder, "shared", "openai")
    assert shared.tags == TagSpec(**tags) and shared.tags.system_tag == "system"
    assert (openai.tags.role_tag, openai.tags.user_tag, openai.tags.observation_tag) == (
        "role",
        "user",
        "tool",
    )
    assert openai.columns.messages == "messages"


def test_yaml_and_paths_are_read_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "dataset_info.yaml").write_text("demo:\n  file_name: rows.jsonl\n  num_samples: 2\n")
    monkeypatch.chdir(folder.parent)
    by_name, by_file, by_path = resolve(folder, "demo", "rows.json", f"{folder.name}/rows.jsonl")
    assert by_name.num_samples == 2
    assert by_file.name == "rows" and columns(by_file) == ROWS
    assert columns(by_path) == ROWS


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"file_name": "rows.json", "colums": {}}, "unknown key 'colums'; did you mean 'columns'"),
        ({"file_name": "rows.json", "columns": {"promt": "x"}}, "unknown key 'promt'; did you mean 'prompt'"),
        ({"file_name": "rows.json", "tags": {"user": "x"}}, "did you mean 'user_tag'"),
        (
            {"script_url": "load.py"},
            "demo: script_url names a data set script, which the library `datasets` no longer runs; save its",
        ),
        ({"file_name": "load.py"}, r"load\.py is a data set script, which the library `datasets` no longer"),
        (
            {"ms_hub_url": "x/y"},
            "data set 'demo': x/y on ModelScope is not on this machine, and HF_HUB_OFFLINE is set; download it",
        ),
        ({"om_hub_url": "x/y"}, "demo: om_hub_url names a data set on Modelers, which is not read; download"),
        (
            {"cloud_file_name": "s3://x/rows.json"},
            "data set 'demo': s3://x/rows.json is not on this machine, and HF_HUB_OFFLINE is set; download it",
        ),
        ({"formatting": "alpaca"}, "demo: says nowhere where the data is; give file_name or hf_hub_url"),
        ({"file_name": "rows.json", "num_samples": 0}, "demo.num_samples: Input should be greater than 0"),
        (
            {"file_name": "rows.json", "split": "test"},
            "split is for data sets on the hub, and .*rows.json is a",
        ),
        ({"file_name": "rows.json", "subset": "en"}, "subset is for data sets on the hub"),
        ({"file_name": "rows.json", "folder": "en"}, "folder is for data sets on the hub"),
        ({"file_name": "rows.json", "revision": "v1"}, "revision is for data sets on the hub"),
        ("rows.json", "demo: expected an object, found str"),
        ({"file_name": "rows.json", "columns": "prompt"}, "demo.columns: expected an object, found str"),
        ({"file_name": "rows.json", "formatting": "alpacca"}, "demo.formatting"),
        ({"file_name": "gone.json"}, "does not exist"),
        ({"file_name": "dataset_info.json.bak"}, "cannot read '.bak'"),
    ],
)
def test_wrong_entries_are_named(folder: Path, entry: dict[str, Any], message: str) -> None:
    (folder / "dataset_info.json.bak").write_text("")
    info(folder, demo=entry)
    with pytest.raises(DataError, match=message):
        resolve(folder, "demo")


def test_an_entry_with_several_origins_is_read_from_the_first_that_can_be(folder: Path) -> None:
    several = {"hf_hub_url": "org/set", "ms_hub_url": "x/y", "script_url": "load.py"}
    info(folder, hub=several, file={"file_name": "rows.json", "ms_hub_url": "x/y", "om_hub_url": "x/y"})
    hub, file = resolve(folder, "hub", "file")
    assert (hub.load_from, hub.path) == ("hub", "org/set")
    assert (file.load_from, columns(file)) == ("file", ROWS)


def test_an_unknown_name_lists_the_nearest(folder: Path) -> None:
    info(folder, alpaca_en_demo={"file_name": "rows.json"}, other={"file_name": "rows.json"})
    with pytest.raises(DataError, match=r"'alpaca_en' is neither in .*did you mean alpaca_en_demo\?"):
        resolve(folder, "alpaca_en")


def test_a_sha1_that_differs_shows_both(folder: Path) -> None:
    found = hashlib.sha1((folder / "rows.json").read_bytes()).hexdigest()
    good, bad = resolve(
        folder,
        DatasetSpec(file_name="rows.json", dataset_sha1=found.upper()),
        DatasetSpec(file_name="rows.json", dataset_sha1="0" * 40),
    )
    assert columns(good) == ROWS
    with pytest.raises(DataError, match=f"{found}.*{'0' * 40}"):
        columns(bad)


def test_every_file_type_gives_the_same_rows(folder: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, folder / "rows.parquet")
    with (
        pa.OSFile(str(folder / "stream.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    with pa.OSFile(str(folder / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    (folder / "rows.csv").write_text('instruction,output\na,1\n"b",2\nc,3\n')
    (folder / "lines.json").write_text("\n".join(map(json.dumps, ROWS)))
    names = [
        "rows.json",
        "rows.jsonl",
        "rows.parquet",
        "stream.arrow",
        "file.arrow",
        "rows.csv",
        "lines.json",
    ]
    for attr in resolve(folder, *names):
        rows = list(read_rows(attr))
        assert [dict(row.columns) for row in rows] == ROWS, attr.path
        assert [row.index for row in rows] == [0, 1, 2]
    assert len({data_fingerprint(attr) for attr in resolve(folder, *names)}) == len(names)


def test_text_files_give_one_row_for_each_line(folder: Path) -> None:
    (folder / "wiki.txt").write_bytes("one \r\n\ntwo\u2028same line".encode())
    (attr,) = resolve(folder, "wiki.txt")
    assert columns(attr) == [{"text": "one "}, {"text": ""}, {"text": "two\u2028same line"}]
    assert attr.columns == ColumnSpec(prompt="text")


def test_mixed_types_and_dates_stay_what_they_are(folder: Path) -> None:
    rows = [{"a": "2024-01-01", "b": "x"}, {"a": {"k": 1}, "b": ["y"]}, {"b": 3}]
    (folder / "mixed.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert columns(resolve(folder, "mixed.jsonl")[0]) == rows


def test_folders_are_read_in_the_order_of_their_names(folder: Path) -> None:
    parts = folder / "parts"
    parts.mkdir()
    (parts / "b.jsonl").write_text(json.dumps(ROWS[1]))
    (parts / "a.jsonl").write_text(json.dumps(ROWS[0]))
    (attr,) = resolve(folder, "parts")
    assert attr.load_from == "folder"
    assert [(row.index, row.columns["instruction"]) for row in read_rows(attr)] == [(0, "a"), (1, "b")]
    (parts / "c.json").write_text(json.dumps(ROWS[2:]))
    assert columns(resolve(folder, "parts")[0]) == ROWS
    (parts / "d.csv").write_text("instruction\n")
    with pytest.raises(DataError, match=r"mixes \.csv, \.json, \.jsonl"):
        resolve(folder, "parts")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"a": 1}\n{"a": }', r"x\.jsonl, line 2, column 7: not JSON"),
        ("x.json", '[{"a": 1},\n {"a" 1}]', r"x\.json, line 2, column 7: not JSON"),
        ("x.json", '[{"a": 1}, "text"]', r"x\.json, row 1: expected an object with columns, found str"),
        ("x.csv", "a,b\n1,2\n1,2,3\n", r"x\.csv, line 3: more cells"),
        ("x.parquet", "no", r"x\.parquet: not a Parquet file"),
        ("x.arrow", "no arrow", r"x\.arrow: not an Arrow file"),
    ],
)
def test_broken_files_name_their_place(folder: Path, name: str, content: str, message: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=message):
        columns(resolve(folder, name)[0])


def test_files_that_are_not_utf8_say_where(folder: Path) -> None:
    (folder / "x.txt").write_bytes(b"abc\n\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8 at byte 4"):
        columns(resolve(folder, "x.txt")[0])


def test_a_named_column_must_be_in_some_row(folder: Path) -> None:
    rows = [{"instruction": "a", "output": "1"}, {"instruction": "b", "output": "2", "system": "s"}]
    (folder / "some.json").write_text(json.dumps(rows))
    good = DatasetSpec(file_name="some.json", columns=ColumnSpec(system="system"))
    bad = DatasetSpec(file_name="some.json", columns=ColumnSpec(system="sytem"))
    assert columns(resolve(folder, good)[0]) == rows
    with pytest.raises(
        DataError, match=r"columns\.system names 'sytem', which no row .* instruction, output, system"
    ):
        columns(resolve(folder, bad)[0])


def test_max_samples_keeps_the_first_and_num_samples_draws(folder: Path) -> None:
    spec = DatasetSpec(file_name="rows.json", num_samples=5)
    drawn = [row.index for row in read_rows(resolve(folder, spec)[0], rng=np.random.RandomState(7))]
    reference = np.random.RandomState(7)
    order = reference.permutation(3)
    assert drawn == [*order, *reference.choice(3, 2)]
    assert columns(resolve(folder, "rows.json")[0], max_samples=2) == ROWS[:2]
    first = read_rows(resolve(folder, spec)[0], rng=np.random.RandomState(7), max_samples=2)
    assert [row.index for row in first] == drawn[:2]
