"""Files that are elsewhere: fetched into the cache once, and from then on read like local ones.

    fetch(address, name, cache, offline)              -> the local file or folder
    fetch_modelscope(repository, revision, name, ...) -> the local folder of a data set on ModelScope

An address has a protocol: `https://`, or any that fsspec knows (`s3://`, `gs://`, `hf://`, `memory://`, ...). It names
a file, a folder with all that is in it, or several files by a pattern (`s3://bucket/part-*.jsonl`).

What was fetched lies in `<cache>/sources/<SHA-256 of its names and bytes>/`. A record beside it, whose name is the hash
of the address and of what the store says of the files' versions, says which of these folders it is. Both appear by
renaming, so that nothing half-written is ever read. A store that gives no versions is asked for the bytes every time.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import re
import secrets
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from luthier.data.cache import content_key
from luthier.files import write_whole
from luthier.types import DataError

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+://")
_CHUNK = 1 << 20
_TIMEOUT = 60
"""Seconds without a byte after which a web server is given up."""

_EXTRAS = {
    "s3": ("s3fs", "pip install 'luthier[s3]'"),
    "s3a": ("s3fs", "pip install 'luthier[s3]'"),
    "gs": ("gcsfs", "pip install 'luthier[gcs]'"),
    "gcs": ("gcsfs", "pip install 'luthier[gcs]'"),
}
"""What each protocol needs beside fsspec."""

_STORE_ERRORS = {
    **dict.fromkeys(("s3", "s3a"), ("botocore.exceptions:BotoCoreError",)),
    **dict.fromkeys(("gs", "gcs"), ("gcsfs.retry:HttpError", "google.auth.exceptions:GoogleAuthError")),
}
"""What the libraries of some stores raise that is no OSError."""

_NO_VERSION = {"name", "size", "type", "kind", "url", "mimetype", "partial"}
"""What a store says of a file that tells nothing of its version; the address of a download may differ each time."""


@dataclass(frozen=True, slots=True)
class _Listed:
    """Files of an address by their paths below it, what their store says of their versions, and how they are opened."""

    paths: Mapping[str, str]
    versions: Mapping[str, Any] | None
    open: Callable[[str], Any]
    is_folder: bool


def is_remote(path: str) -> bool:
    """Whether a text is an address with a protocol, and not a path."""
    return _ADDRESS.match(path) is not None


def joined(address: str, path: str) -> str:
    """A path below an address; another address stays what it is."""
    return path if is_remote(path) else f"{address.rstrip('/')}/{path}"


def fetch(address: str, label: str, cache: Path, *, offline: bool = False) -> Path:
    """The local copy of what is at `address`, a file or a folder; `label` names it in messages.

    Raises DataError where it cannot be fetched, and where the run is offline (`data.offline`, HF_HUB_OFFLINE).
    """
    require_online(label, address, offline)
    listed = _listed(address, label)
    index = None
    if listed.versions is not None:
        stamp = json.loads(json.dumps([address, listed.versions], default=str))
        index = cache / "sources" / f"{content_key({'files': stamp})}.json"
        if (found := _kept(index, listed)) is not None:
            return found
    return _local(_download(address, label, listed, cache, index), listed)


def fetch_modelscope(
    repository: str, revision: str | None, label: str, *, token: str | None = None, offline: bool = False
) -> Path:
    """The folder with the files of a data set on ModelScope, which that library keeps in its own cache.

    Raises DataError where it cannot be fetched or the run is offline.
    """
    require_online(label, f"{repository} on ModelScope", offline)
    if importlib.util.find_spec("modelscope") is None:
        raise DataError(
            f"{label}: {repository} is on ModelScope, which needs modelscope: pip install 'luthier[modelscope]'"
        )
    from modelscope.hub.snapshot_download import dataset_snapshot_download  # type: ignore[import-not-found]

    try:
        return Path(dataset_snapshot_download(repository, revision=revision, token=token))
    except _errors("modelscope.hub.errors:HubError", "requests.exceptions:RequestException") as error:
        raise DataError(f"{label}: cannot fetch {repository} from ModelScope: {_said(error)}") from error


def require_online(label: str, address: str, offline: bool) -> None:
    """Raise DataError where the recipe or the environment forbids the network; `memory://` and `file://` need none."""
    from huggingface_hub import constants

    if address.startswith(("memory://", "file://", "local://")):
        return
    if offline or constants.HF_HUB_OFFLINE:
        key = "data.offline is true" if offline else "HF_HUB_OFFLINE is set"
        raise DataError(
            f"{label}: {address} is not on this machine, and {key}; download it and give its path in file_name, or "
            "allow the network"
        )


# --------------------------------------------------------------------------------------------------
# What there is


def _listed(address: str, label: str) -> _Listed:
    protocol = address.partition("://")[0].lower()
    if protocol in ("http", "https"):
        return _web_file(address, label)
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]

    try:
        store, path = url_to_fs(address)
    except (ImportError, ValueError) as error:
        library, remedy = _EXTRAS.get(protocol, ("", ""))
        if library and importlib.util.find_spec(library) is None:
            raise DataError(f"{label}: {address} needs {library}: {remedy}") from error
        raise DataError(f"{label}: {address}: {_said(error)}") from error
    try:
        return _files(store, path, address, label)
    except _errors(*_STORE_ERRORS.get(protocol, ())) as error:
        raise DataError(f"{label}: cannot list {address}: {_said(error)}") from error


def _files(store: Any, path: str, address: str, label: str) -> _Listed:
    pattern = any(sign in path for sign in "*?[")
    is_folder = pattern or store.isdir(path)
    if pattern:
        infos = {name: info for name, info in store.glob(path, detail=True).items() if info["type"] == "file"}
        root = path[: min(path.find(sign) for sign in "*?[" if sign in path)].rpartition("/")[0]
    elif is_folder:
        infos, root = store.find(path, detail=True), path
    else:
        infos, root = {path: store.info(path)}, path.rpartition("/")[0]
    root = store._strip_protocol(root).rstrip("/") if root else ""
    names = {name: name.removeprefix(root).lstrip("/") for name in infos}
    shown = {
        name: below
        for name, below in names.items()
        if not any(part.startswith(".") for part in below.split("/"))
    }
    if not shown:
        raise DataError(f"{label}: there are no files at {address}")
    versions = {below: _version(infos[name]) for name, below in shown.items()}
    known = versions if all(versions.values()) else None
    return _Listed({below: name for name, below in shown.items()}, known, store.open, is_folder)


def _version(info: Mapping[str, Any]) -> dict[str, Any] | None:
    """What tells this version of a file from another; None where the store gives nothing of the kind."""
    known = {key: value for key, value in info.items() if key not in _NO_VERSION and value is not None}
    return {**known, "size": info.get("size")} if known else None


def _web_file(address: str, label: str) -> _Listed:
    name = PurePosixPath(unquote(urlsplit(address).path)).name
    if not name:
        raise DataError(f"{label}: {address} names no file")
    request = urllib.request.Request(address, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
            given = {key: answer.headers.get(key) for key in ("ETag", "Last-Modified", "Content-Length")}
    except urllib.error.HTTPError as error:
        if error.code not in (403, 405, 501):  # what servers say that know no HEAD
            raise DataError(f"{label}: cannot fetch {address}: {error}") from error
        given = {}
    except (OSError, HTTPException) as error:
        raise DataError(f"{label}: cannot fetch {address}: {_said(error)}") from error
    has_version = given.get("ETag") or given.get("Last-Modified")
    return _Listed({name: address}, {name: given} if has_version else None, _open_web, False)


def _open_web(address: str) -> Any:
    return urllib.request.urlopen(address, timeout=_TIMEOUT)


# --------------------------------------------------------------------------------------------------
# What was fetched


def _kept(index: Path, listed: _Listed) -> Path | None:
    """The copy of which the record speaks; None where there is none, or where it is damaged."""
    try:
        record = json.loads(index.read_text(encoding="utf-8"))
        folder = index.parent / record["content"]
        if any((folder / name).stat().st_size != size for name, size in record["files"].items()):
            return None
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, KeyError):
        return None
    return _local(folder, listed)


def _local(folder: Path, listed: _Listed) -> Path:
    return folder if listed.is_folder else folder / next(iter(listed.paths))


def _download(address: str, label: str, listed: _Listed, cache: Path, index: Path | None) -> Path:
    """Fetch everything, put it where its content says, and write the record."""
    sources = cache / "sources"
    unfinished = sources / f".{os.getpid()}-{secrets.token_hex(8)}"
    protocol = address.partition("://")[0].lower()
    try:
        unfinished.mkdir(parents=True)
        hashes = {}
        for below, path in sorted(listed.paths.items()):
            target = unfinished.joinpath(*PurePosixPath(below).parts)
            if ".." in PurePosixPath(below).parts:
                raise DataError(f"{label}: {address} has a file called {below!r}, which would lie elsewhere")
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with listed.open(path) as source, target.open("wb") as copy:
                    hashes[below] = _copied(source, copy)
            except _errors(*_STORE_ERRORS.get(protocol, ())) as error:
                raise DataError(f"{label}: cannot fetch {address}: {_said(error)}") from error
        sizes = {below: (unfinished / below).stat().st_size for below in hashes}
        content = content_key({"files": hashes})
        _publish(unfinished, sources / content, sizes)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    if index is not None:
        record = {"address": address, "content": content, "files": sizes}
        write_whole(index, json.dumps(record, indent=1).encode())
    return sources / content


def _publish(unfinished: Path, folder: Path, sizes: Mapping[str, int]) -> None:
    if folder.exists():
        if all(
            (folder / name).is_file() and (folder / name).stat().st_size == size
            for name, size in sizes.items()
        ):
            return  # the same bytes from another address, or by another process
        shutil.rmtree(folder)
    try:
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _copied(source: BinaryIO, target: BinaryIO) -> str:
    """Copy all bytes; returns their SHA-256."""
    digest = hashlib.sha256()
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
        target.write(chunk)
    if isinstance(source, HTTPResponse) and source.length:  # which it keeps to itself
        raise OSError(f"the connection ended {source.length:,} bytes too early")
    return digest.hexdigest()


def _errors(*names: str) -> tuple[type[BaseException], ...]:
    """OSError, ValueError, HTTPException, and of these error classes (`module:name`) those that are installed."""
    found: list[type[BaseException]] = [OSError, ValueError, HTTPException]
    for module, _, name in (text.partition(":") for text in names):
        if importlib.util.find_spec(module.partition(".")[0]) is not None:
            found.append(getattr(importlib.import_module(module), name))
    return tuple(found)


def _said(error: BaseException) -> str:
    return (str(error) or type(error).__name__).partition("\n")[0].rstrip(".")
