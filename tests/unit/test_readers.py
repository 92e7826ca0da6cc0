"""Files that are not what they should be: each with its exact message. And what the hub is asked for."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets.exceptions import DatasetNotFoundError

from luthier.data.read import data_fingerprint, read_rows
from luthier.data.readers import read_file
from luthier.data.registry import DatasetAttr, resolve_datasets
from luthier.recipe.schema import ColumnSpec, DatasetSpec, DataSpec
from luthier.types import DataError

GZIP = b"\x1f\x8b\x08\x00" + bytes(range(200))


def resolve(folder: Path, *names: str | DatasetSpec) -> list[DatasetAttr]:
    return resolve_datasets(names, DataSpec(directory=str(folder)))


def problem(folder: Path, name: str | DatasetSpec) -> str:
    """The message for a data set that cannot be read, its folder written {dir}."""
    with pytest.raises(DataError) as caught:
        list(read_rows(resolve(folder, name)[0]))
    return str(caught.value).replace(str(folder), "{dir}")


BROKEN: dict[str, tuple[str, bytes, str]] = {
    "an empty file": ("x.json", b"", "data set 'x': {dir}/x.json has no rows"),
    "no lines": ("x.jsonl", b"\n \n", "data set 'x': {dir}/x.jsonl has no rows"),
    "an empty list": ("x.json", b"[]", "data set 'x': {dir}/x.json has no rows"),
    "a head alone": ("x.csv", b"instruction,output\n", "data set 'x': {dir}/x.csv has no rows"),
    "an empty text": ("x.txt", b"", "data set 'x': {dir}/x.txt has no rows"),
    "a broken list": (
        "x.json",
        b'[{"a": 1},\n {"a" 1}]',
        "{dir}/x.json, line 2, column 7: not JSON: Expecting ':' delimiter",
    ),
    "a list without its end": (
        "x.json",
        b'[{"a": 1},\n {"a": 2}\n',
        "{dir}/x.json, line 3, column 1: not JSON: Expecting ',' delimiter",
    ),
    "a broken line": (
        "x.jsonl",
        b'{"a": 1}\n\n{"a": }\n',
        "{dir}/x.jsonl, line 3, column 7: not JSON: Expecting value",
    ),
    "an object for a list": (
        "x.json",
        b'{"version": 1,\n "data": [{"a": 1}]}',
        "{dir}/x.json: expected a list of rows, or one row on each line; "
        "found one object with the keys 'version', 'data'",
    ),
    "a text for a row": (
        "x.json",
        b'[{"a": 1}, "text"]',
        "{dir}/x.json, row 1: expected an object with columns, found str",
    ),
    "a list for a row": (
        "x.jsonl",
        b'{"a": 1}\n["a"]',
        "{dir}/x.jsonl, line 2: expected an object with columns, found list",
    ),
    "too deep": (
        "x.jsonl",
        b"[" * 200_000,
        "{dir}/x.jsonl, line 1: this JSON cannot be read: nested too deeply",
    ),
    "not UTF-8": (
        "x.jsonl",
        '{"a": "b"}\n{"a": "café"}\n'.encode("latin-1"),
        "{dir}/x.jsonl, line 2: not UTF-8 at byte 21 (0xe9); convert the file to UTF-8",
    ),
    "not UTF-8 at the end": (
        "x.txt",
        "one\ntwo é".encode()[:-1],
        "{dir}/x.txt: not UTF-8 at its end; convert the file to UTF-8",
    ),
    "UTF-16": (
        "x.json",
        '[{"a": "b"}]'.encode("utf-16"),
        "{dir}/x.json: this is UTF-16 text, not JSON in UTF-8",
    ),
    "an archive": ("x.json", GZIP, "{dir}/x.json: this is a gzip archive, not JSON in UTF-8"),
    "an archive of lines": (
        "x.jsonl",
        GZIP,
        "{dir}/x.jsonl: this is a gzip archive, not JSON lines in UTF-8",
    ),
    "a picture": (
        "x.csv",
        b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
        "{dir}/x.csv: this is a PNG image, not CSV in UTF-8",
    ),
    "weights": (
        "x.json",
        (40).to_bytes(8, "little") + b'{"w": {"dtype": "F32", "shape": [1]}}   ' + b"\0\0\0\xff",
        "{dir}/x.json: this is a safetensors file, not JSON in UTF-8",
    ),
    "zeros": ("x.json", bytes(300), "{dir}/x.json: this is a binary file, not JSON"),
    "noise": (
        "x.txt",
        b"\0" + random.Random(0).randbytes(300),
        "{dir}/x.txt: this is a binary file, not text in UTF-8",
    ),
    "a pointer": (
        "x.json",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        "{dir}/x.json: this is a Git LFS pointer to a file that was not downloaded (git lfs pull), not JSON",
    ),
    "a page": ("x.jsonl", b"<!DOCTYPE html>\n<html>", "{dir}/x.jsonl: this is an HTML page, not JSON lines"),
    "a text for Parquet": (
        "x.parquet",
        b"no",
        "{dir}/x.parquet: not a Parquet file: Parquet file size is 2 bytes, smaller than the minimum file "
        "footer (8 bytes)",
    ),
    "too many cells": (
        "x.csv",
        b"a,b\n1,2\n1,2,3\n",
        "{dir}/x.csv, line 3: more cells than the 2 columns of its head",
    ),
    "a quote without end": (
        "x.csv",
        b'a,b\n1,"2\n3,4\n',
        "{dir}/x.csv, line 2: not CSV: unexpected end of data",
    ),
    "two columns of one name": (
        "x.csv",
        b"a,b,a\n1,2,3\n",
        "{dir}/x.csv, line 1: two columns are called 'a'",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(case: str, tmp_path: Path) -> None:
    name, content, message = BROKEN[case]
    (tmp_path / name).write_bytes(content)
    assert problem(tmp_path, name) == message


def test_an_arrow_file_that_is_none_says_so(tmp_path: Path) -> None:
    for content in (b"", b"no arrow at all", b"ARROW1" + bytes(40)):
        (tmp_path / "x.arrow").write_bytes(content)
        assert problem(tmp_path, "x.arrow").startswith("{dir}/x.arrow: not an Arrow file: ")


def test_the_place_of_a_wrong_byte_is_right_in_a_long_file(tmp_path: Path) -> None:
    """The byte is counted in the file and not in the decoder's buffer, also where a character is cut in two."""
    for offset in (0, 1, 2):
        text = ("x" * offset + "é" * 39 + "\n").encode() * 30_000
        (tmp_path / "x.txt").write_bytes(text + b"ok \xff\n")
        assert problem(tmp_path, "x.txt") == (
            f"{{dir}}/x.txt, line 30001: not UTF-8 at byte {len(text) + 3} (0xff); convert the file to UTF-8"
        )


def test_a_checksum_that_differs_shows_both(tmp_path: Path) -> None:
    content = b'[{"instruction": "a", "output": "b"}]'
    (tmp_path / "x.json").write_bytes(content)
    found = hashlib.sha1(content).hexdigest()
    spec = DatasetSpec(file_name="x.json", dataset_sha1="0" * 40)
    assert problem(tmp_path, spec) == (
        f"data set 'x': {{dir}}/x.json has SHA-1 {found}, but {'0' * 40} was promised: "
        "the file is not the one that was described"
    )
    (tmp_path / "parts").mkdir()
    for part in ("a.json", "b.json"):
        (tmp_path / "parts" / part).write_bytes(content)
    spec = DatasetSpec(file_name="parts", dataset_sha1=found)
    assert problem(tmp_path, spec) == (
        "data set 'parts': dataset_sha1 is for one file, and {dir}/parts is a folder"
    )


def test_a_column_that_no_row_has(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('[{"instruction": "a", "output": "b"}]')
    spec = DatasetSpec(file_name="x.json", columns=ColumnSpec(system="sytem"))
    assert problem(tmp_path, spec) == (
        "data set 'x': columns.system names 'sytem', which no row of {dir}/x.json has; "
        "its columns are instruction, output"
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "dataset_info.json",
            b'{"demo"\n {}}',
            "{dir}/dataset_info.json, line 2, column 2: not JSON: Expecting ':' delimiter",
        ),
        (
            "dataset_info.json",
            b"[]",
            "{dir}/dataset_info.json: expected an object of data set names, found list",
        ),
        (
            "dataset_info.json",
            b'{"\xff": 1}',
            "{dir}/dataset_info.json: not UTF-8 at byte 2; convert it to UTF-8",
        ),
        ("dataset_info.yaml", b"demo: [", "{dir}/dataset_info.yaml: not YAML: "),
    ],
)
def test_broken_descriptions(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        resolve(tmp_path, "demo")
    told = str(caught.value).replace(str(tmp_path), "{dir}")
    assert told.startswith(message) if message.endswith("YAML: ") else told == message


# --------------------------------------------------------------------------------------------------
# What must be read


def test_long_cells_empty_heads_and_byte_order_marks(tmp_path: Path) -> None:
    long = "x" * 300_000
    (tmp_path / "x.csv").write_text(f'\ufeff,instruction,output\n0,"{long}","a\nb"\n1,q,\n', encoding="utf-8")
    rows = [row for _, row in read_file(tmp_path / "x.csv")]
    assert rows == [
        {"": "0", "instruction": long, "output": "a\nb"},
        {"": "1", "instruction": "q", "output": ""},
    ]
    (tmp_path / "x.txt").write_text("\ufeffone\n", encoding="utf-8")
    assert list(read_file(tmp_path / "x.txt")) == [("line 1", {"text": "one"})]
    (tmp_path / "x.json").write_text('{"a": 1}\n', encoding="utf-8")
    assert list(read_file(tmp_path / "x.json")) == [("line 1", {"a": 1})]
    (tmp_path / "y.json").write_text('\ufeff\n [{"a": NaN}]', encoding="utf-8")
    ((place, row),) = read_file(tmp_path / "y.json")
    assert place == "row 0" and np.isnan(row["a"])


def test_an_empty_part_of_a_folder_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "a.jsonl").write_text("")
    (tmp_path / "parts" / "b.jsonl").write_text('{"a": 1}')
    (row,) = read_rows(resolve(tmp_path, "parts")[0])
    assert row.columns == {"a": 1} and row.place == f"{tmp_path}/parts/b.jsonl, line 1"


# --------------------------------------------------------------------------------------------------
# The hub


class Hub:
    """Stands in for `datasets.load_dataset`: remembers what it was asked for."""

    def __init__(self, rows: list[dict[str, Any]], fingerprint: str = "f1") -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.rows, self._fingerprint = rows, fingerprint
        self.error: Exception | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Hub:
        self.calls.append((args, kwargs))
        if self.error is not None:
            raise self.error
        return self

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub([{"instruction": "a", "output": "1"}, {"instruction": "b", "output": "2"}])
    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    return stand_in


def test_the_hub_is_asked_with_token_revision_and_cache(hub: Hub, tmp_path: Path) -> None:
    spec = DatasetSpec(
        hf_hub_url="org/set", revision="v2", subset="en", split="train[:10]", folder="chat", name="own"
    )
    (attr,) = resolve(tmp_path, spec)
    assert (attr.name, attr.load_from, attr.path) == ("own", "hub", "org/set")
    rows = list(read_rows(attr, cache_dir="/somewhere", token="hf_secret"))
    assert hub.calls == [
        (
            ("org/set", "en"),
            {
                "data_dir": "chat",
                "split": "train[:10]",
                "cache_dir": "/somewhere",
                "revision": "v2",
                "token": "hf_secret",
            },
        )
    ]
    assert [(row.index, row.place, dict(row.columns)) for row in rows] == [
        (0, "org/set (train[:10]), row 0", hub.rows[0]),
        (1, "org/set (train[:10]), row 1", hub.rows[1]),
    ]


def test_the_hub_is_asked_for_plain_names_by_their_defaults(hub: Hub, tmp_path: Path) -> None:
    info = {"demo": {"hf_hub_url": "org/set", "num_samples": 1, "revision": "abc"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    (attr,) = resolve(tmp_path, "demo")
    assert len(list(read_rows(attr))) == 1
    asked = {"data_dir": None, "split": "train", "cache_dir": None, "revision": "abc", "token": None}
    assert hub.calls == [(("org/set", None), asked)]
    before = data_fingerprint(attr)
    assert data_fingerprint(attr) == before
    hub._fingerprint = "f2"
    assert data_fingerprint(attr) != before


@pytest.mark.parametrize(
    "error",
    [
        DatasetNotFoundError("Dataset 'org/set' doesn't exist on the Hub."),
        RuntimeError("Dataset scripts are no longer supported, but found set.py"),
        ConnectionError("Couldn't reach the Hugging Face Hub"),
        ValueError('Unknown split "trian". Should be one of ["train"].'),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_the_hub_refuses_is_told(hub: Hub, tmp_path: Path, error: Exception) -> None:
    hub.error = error
    message = f"data set 'org/set': cannot load 'org/set' from the hub: {error}"
    assert problem(tmp_path, DatasetSpec(hf_hub_url="org/set")) == message


def test_recipes_hand_on_token_cache_and_revision(hub: Hub, tmp_path: Path) -> None:
    """From the recipe's keys to the call."""
    from luthier.material import read_material
    from luthier.recipe.load import load_recipe
    from luthier.recipe.resolve import Hardware, resolve
    from tiny_tokenizers import byte_level

    tree = {
        "model": {"path": "tiny", "cache_dir": str(tmp_path / "hub"), "token": "hf_secret"},
        "data": {
            "train": [{"hf_hub_url": "org/set", "revision": "v2"}],
            "cache": str(tmp_path / "cache"),
            "template": "default",
        },
    }
    recipe = resolve(load_recipe(tree), Hardware("cpu", "a processor", 2**33, True, 2)).recipe
    material = read_material(recipe, byte_level(), lambda text: None)
    assert len(material.data.train) == 2
    wanted = {"cache_dir": str(tmp_path / "hub"), "token": "hf_secret", "revision": "v2"}
    assert hub.calls and all(wanted.items() <= kwargs.items() for _, kwargs in hub.calls)
