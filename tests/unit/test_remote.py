"""Data sets that are elsewhere: fetched once, whole, and read like local ones."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pytest
from huggingface_hub import constants

from luthier.data import remote
from luthier.data.read import data_fingerprint, read_rows
from luthier.data.registry import DatasetAttr, resolve_datasets
from luthier.recipe.schema import DatasetSpec, DataSpec
from luthier.types import DataError

ROWS = [{"instruction": "a", "output": "1"}, {"instruction": "b", "output": "2"}]
TEXT = json.dumps(ROWS).encode()


@pytest.fixture
def store() -> Iterator[Any]:
    """An empty store in memory; counts the files that are opened."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    yield memory
    memory.store.clear()


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def resolve(cache: Path, *refs: str | DatasetSpec, **fields: Any) -> list[DatasetAttr]:
    return resolve_datasets(refs, DataSpec(cache=str(cache), **fields))


def rows(attr: DatasetAttr) -> list[dict[str, Any]]:
    return [dict(row.columns) for row in read_rows(attr)]


def test_a_file_is_fetched_once_for_each_of_its_versions(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.pipe_file("/bucket/rows.json", TEXT)
    downloads: list[str] = []
    copied = remote._copied
    monkeypatch.setattr(remote, "_copied", lambda *files: downloads.append("") or copied(*files))  # type: ignore[func-returns-value]
    (attr,) = resolve(tmp_path, "memory://bucket/rows.json")
    assert attr.name == "rows" and attr.load_from == "file" and rows(attr) == ROWS
    (again,) = resolve(tmp_path, DatasetSpec(name="mine", cloud_file_name="memory://bucket/rows.json"))
    assert again.path == attr.path and len(downloads) == 1
    assert Path(attr.path).is_relative_to(tmp_path / "sources")
    store.pipe_file("/bucket/rows.json", json.dumps(ROWS[:1]).encode())
    (changed,) = resolve(tmp_path, "memory://bucket/rows.json")
    assert rows(changed) == ROWS[:1] and len(downloads) == 2
    assert data_fingerprint(changed) != data_fingerprint(attr)
    store.pipe_file("/other/rows.json", TEXT)
    assert resolve(tmp_path, "memory://other/rows.json")[0].path == attr.path  # the same bytes, one copy
    assert not [path for path in (tmp_path / "sources").iterdir() if path.name.startswith(".")]


def test_a_damaged_copy_is_fetched_again(store: Any, tmp_path: Path) -> None:
    store.pipe_file("/bucket/rows.json", TEXT)
    (attr,) = resolve(tmp_path, "memory://bucket/rows.json")
    Path(attr.path).write_bytes(TEXT[:-5])
    assert rows(resolve(tmp_path, "memory://bucket/rows.json")[0]) == ROWS


@pytest.mark.parametrize(
    "address", ["memory://bucket/parts", "memory://bucket/parts/", "memory://bucket/parts/**/*.json"]
)
def test_folders_and_patterns_are_read_in_the_order_of_their_paths(
    address: str, store: Any, tmp_path: Path
) -> None:
    store.pipe_file("/bucket/parts/a.json", json.dumps(ROWS[:1]).encode())
    store.pipe_file("/bucket/parts/more/b.json", json.dumps(ROWS[1:]).encode())
    store.pipe_file("/bucket/parts/.hidden", b"x")
    (attr,) = resolve(tmp_path, address)
    assert attr.load_from == "folder" and rows(attr) == ROWS


def test_a_directory_elsewhere_has_its_own_dataset_info(store: Any, tmp_path: Path) -> None:
    store.pipe_file("/set/rows.json", TEXT)
    store.pipe_file("/set/dataset_info.json", json.dumps({"demo": {"file_name": "rows.json"}}).encode())
    by_name, by_file, by_spec = resolve(
        tmp_path, "demo", "rows.json", DatasetSpec(file_name="rows.json"), directory="memory://set"
    )
    assert by_name.name == "demo"
    assert rows(by_name) == rows(by_file) == rows(by_spec) == ROWS
    with pytest.raises(
        DataError, match=r"'dem' is not in memory://set/dataset_info.json; did you mean demo\?"
    ):
        resolve(tmp_path, "dem", directory="memory://set")


def test_a_promised_hash_holds_for_what_was_fetched(store: Any, tmp_path: Path) -> None:
    store.pipe_file("/bucket/rows.json", TEXT)
    right = hashlib.sha1(TEXT).hexdigest()
    (attr,) = resolve(tmp_path, DatasetSpec(cloud_file_name="memory://bucket/rows.json", dataset_sha1=right))
    assert rows(attr) == ROWS
    (wrong,) = resolve(
        tmp_path, DatasetSpec(cloud_file_name="memory://bucket/rows.json", dataset_sha1="0" * 40)
    )
    with pytest.raises(DataError, match="SHA-1"):
        rows(wrong)


# --------------------------------------------------------------------------------------------------
# A web server


class Server(BaseHTTPRequestHandler):
    """One file; counts the requests for its bytes, and breaks off where it is told to."""

    etag: str | None = '"1"'
    content = TEXT
    cut = False
    asked: list[str]

    def _head(self) -> None:
        if self.path != "/data/rows.json":
            self.send_error(404, "Not Found")
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        if self.etag is not None:
            self.send_header("ETag", self.etag)
        self.end_headers()

    def do_HEAD(self) -> None:
        self._head()

    def do_GET(self) -> None:
        type(self).asked.append(self.path)
        self._head()
        self.wfile.write(self.content[: 10 if self.cut else None])

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(online: None) -> Iterator[tuple[str, type[Server]]]:
    kind = type("Counting", (Server,), {"asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/data", kind
        running.shutdown()
        thread.join()


def test_a_web_file_is_fetched_once_for_each_etag(server: tuple[str, type[Server]], tmp_path: Path) -> None:
    address, kind = server
    for _ in range(2):
        assert rows(resolve(tmp_path, f"{address}/rows.json")[0]) == ROWS
    assert len(kind.asked) == 1
    kind.etag, kind.content = '"2"', json.dumps(ROWS[:1]).encode()
    assert rows(resolve(tmp_path, f"{address}/rows.json")[0]) == ROWS[:1]
    kind.etag = None  # nothing says whether it is the same one
    for _ in range(2):
        assert rows(resolve(tmp_path, f"{address}/rows.json")[0]) == ROWS[:1]
    assert len(kind.asked) == 4


def test_a_download_that_breaks_off_leaves_nothing(server: tuple[str, type[Server]], tmp_path: Path) -> None:
    address, kind = server
    kind.cut = True
    with pytest.raises(DataError, match=f"data set 'rows': cannot fetch {address}/rows.json: "):
        resolve(tmp_path, f"{address}/rows.json")
    assert list((tmp_path / "sources").iterdir()) == []
    kind.cut = False
    assert rows(resolve(tmp_path, f"{address}/rows.json")[0]) == ROWS


def test_a_web_file_that_is_not_there(server: tuple[str, type[Server]], tmp_path: Path) -> None:
    address, _ = server
    with pytest.raises(DataError, match=f"cannot fetch {address}/gone.json: HTTP Error 404"):
        resolve(tmp_path, f"{address}/gone.json")


# --------------------------------------------------------------------------------------------------
# ModelScope, and refusals


def test_modelscope_gives_a_folder_that_the_library_reads(
    tmp_path: Path, online: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in with the one function that is called: the package is not installed here."""
    (tmp_path / "repo" / "data").mkdir(parents=True)
    (tmp_path / "repo" / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    asked: list[tuple[str, str | None, str | None]] = []

    def dataset_snapshot_download(name: str, *, revision: str | None, token: str | None) -> str:
        asked.append((name, revision, token))
        return str(tmp_path / "repo")

    names = ("modelscope", "modelscope.hub", "modelscope.hub.snapshot_download", "modelscope.hub.errors")
    modules = {name: ModuleType(name) for name in names}
    for name, module in modules.items():
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    modules["modelscope.hub.snapshot_download"].dataset_snapshot_download = dataset_snapshot_download  # type: ignore[attr-defined]
    modules["modelscope.hub.errors"].HubError = type("HubError", (Exception,), {})  # type: ignore[attr-defined]
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    (attr,) = resolve(tmp_path, DatasetSpec(ms_hub_url="org/set", revision="v1"))
    assert (attr.name, attr.load_from, asked) == ("org/set", "hub", [("org/set", "v1", None)])
    read = [dict(row.columns) for row in read_rows(attr, cache_dir=str(tmp_path / "hf"))]
    assert read == ROWS


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cloud_file_name": "s3://bucket/x.json"}, r"needs s3fs: pip install 'luthier\[s3\]'"),
        ({"cloud_file_name": "gs://bucket/x.json"}, r"needs gcsfs: pip install 'luthier\[gcs\]'"),
        ({"ms_hub_url": "org/set"}, r"needs modelscope: pip install 'luthier\[modelscope\]'"),
        (
            {"cloud_file_name": "nowhere://x.json"},
            "data set 'x': nowhere://x.json: Protocol not known: nowhere",
        ),
        ({"cloud_file_name": "memory://gone.json"}, "cannot list memory://gone.json: "),
        ({"cloud_file_name": "memory://gone/*.json"}, r"there are no files at memory://gone/\*.json"),
    ],
)
def test_what_cannot_be_fetched_is_named(
    fields: dict[str, Any], message: str, store: Any, online: None, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        resolve(tmp_path, DatasetSpec(**fields))


@pytest.mark.parametrize(
    "fields",
    [{"cloud_file_name": "https://host/x.json"}, {"ms_hub_url": "org/set"}, {"hf_hub_url": "org/set"}],
)
def test_offline_nothing_is_asked_for(fields: dict[str, Any], online: None, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"not on this machine, and data\.offline is true; download it and give"
    ):
        resolve(tmp_path, DatasetSpec(**fields), offline=True)


def test_the_environment_says_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"data\.directory=hf://datasets/a/b: .* HF_HUB_OFFLINE is set"):
        resolve(tmp_path, "demo", directory="hf://datasets/a/b")
