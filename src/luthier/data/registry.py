"""Names in a recipe -> descriptions of data sets.

    resolve_datasets(refs, spec)  -> list[DatasetAttr]

`dataset_info.json` is read in LLaMA-Factory's format. A data set may also be named by the path of its file,
or be written out in the recipe. The rows themselves are read by `luthier.data.read`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from luthier.data.cache import default_folder
from luthier.data.remote import fetch, fetch_modelscope, is_remote, joined, require_online
from luthier.recipe.schema import ColumnSpec, DatasetSpec, DataSpec, TagSpec
from luthier.types import DataError

Formatting = Literal["alpaca", "sharegpt", "openai"]
LoadFrom = Literal["hub", "script", "file", "folder"]

INFO_NAMES = ("dataset_info.json", "dataset_info.yaml", "dataset_info.yml")
FILE_TYPES = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "txt",
}

DEFAULT_COLUMNS: dict[Formatting, ColumnSpec] = {
    "alpaca": ColumnSpec(prompt="instruction", query="input", response="output"),
    "sharegpt": ColumnSpec(messages="conversations"),
    "openai": ColumnSpec(messages="messages"),
}
DEFAULT_TAGS: dict[Formatting, TagSpec] = {
    "alpaca": TagSpec(),
    "sharegpt": TagSpec(),
    "openai": TagSpec(
        role_tag="role",
        content_tag="content",
        user_tag="user",
        assistant_tag="assistant",
        observation_tag="tool",
        function_tag="function",
        system_tag="system",
    ),
}

_SCRIPT = "a data set script, which the library `datasets` no longer runs"
_NOT_READ = {
    "script_url": f"names {_SCRIPT}; save its rows as a file and name that in file_name",
    "om_hub_url": "names a data set on Modelers, which is not read; download it and name the file in file_name",
}
"""Origins of LLaMA-Factory's dataset_info.json that are known and refused, and why."""
_ORIGINS = ("hf_hub_url", "cloud_file_name", "file_name", "ms_hub_url")
"""Where rows may come from; of several that an entry names the first is taken. With USE_MODELSCOPE_HUB=1, the name of
LLaMA-Factory's own switch, ModelScope comes first."""
_INFO_KEYS = {
    *_ORIGINS,
    *_NOT_READ,
    "revision",
    "dataset_sha1",
    "file_sha1",
    "subset",
    "split",
    "folder",
    "num_samples",
    "formatting",
    "ranking",
    "columns",
    "tags",
}


@dataclass(frozen=True, slots=True)
class DatasetAttr:
    """One data set, fully described: where its rows come from and which column means what.

    `path` is the file or folder for `file`, `folder` and `script`, the hub's name for `hub`. A `script` is
    described so that it can be refused by name. `revision`, `subset`, `split` and `folder` are the hub's. A
    column that is None is not read. `named` holds the columns that somebody wrote down, as against the
    format's own defaults: those must exist.
    """

    name: str
    load_from: LoadFrom
    path: str
    dataset_sha1: str | None = None
    revision: str | None = None
    subset: str | None = None
    split: str = "train"
    folder: str | None = None
    num_samples: int | None = None
    ranking: bool = False
    formatting: Formatting = "alpaca"
    columns: ColumnSpec = DEFAULT_COLUMNS["alpaca"]
    tags: TagSpec = DEFAULT_TAGS["alpaca"]
    named: frozenset[str] = frozenset()
    media_directory: str | None = ""
    """Where the files are that rows name."""

    def files(self) -> list[Path]:
        """The data files in the order in which they are read; empty for a data set on the hub.

        Raises DataError where there are none or where their types differ.
        """
        if self.load_from == "hub":
            return []
        path = Path(self.path)
        if self.load_from == "script":
            raise DataError(f"data set {self.name!r}: {path} is {_SCRIPT}; save its rows as a file instead")
        if path.is_dir():
            files = sorted(f for f in path.iterdir() if f.is_file() and not f.name.startswith("."))
            files += _in_subfolders(path)
        elif path.is_file():
            files = [path]
        else:
            raise DataError(f"data set {self.name!r}: {path} does not exist")
        if not files:
            raise DataError(f"data set {self.name!r}: folder {path} has no files")
        endings = {f.suffix.lower() for f in files}
        unknown = sorted(endings - FILE_TYPES.keys())
        if unknown:
            raise DataError(
                f"data set {self.name!r}: cannot read {unknown[0] or 'a file without extension'!r} "
                f"({path}); readable are {', '.join(sorted(FILE_TYPES))}"
            )
        if len({FILE_TYPES[ending] for ending in endings}) > 1:
            raise DataError(
                f"data set {self.name!r}: folder {path} mixes {', '.join(sorted(endings))}; one type, please"
            )
        return files

    def check_sha1(self) -> None:
        """Raise DataError if the file's SHA-1 is not the one that was promised."""
        if self.dataset_sha1 is None or self.load_from == "hub":
            return
        files = self.files()
        if len(files) > 1:
            raise DataError(
                f"data set {self.name!r}: dataset_sha1 is for one file, and {self.path} is a folder"
            )
        with files[0].open("rb") as stream:
            found = hashlib.file_digest(stream, _sha1).hexdigest()
        if found != self.dataset_sha1.lower():
            raise DataError(
                f"data set {self.name!r}: {files[0]} has SHA-1 {found}, but {self.dataset_sha1} was "
                "promised: the file is not the one that was described"
            )


def _in_subfolders(folder: Path) -> list[Path]:
    """Files of rows in subfolders, by their paths; images and the like beside them are left alone."""
    found = [file for file in folder.rglob("*") if file.suffix.lower() in FILE_TYPES and file.is_file()]
    below = [file for file in found if file.parent != folder]
    return sorted(f for f in below if not any(p.startswith(".") for p in f.relative_to(folder).parts))


def _sha1() -> Any:
    return hashlib.sha1(usedforsecurity=False)


def resolve_datasets(refs: Sequence[str | DatasetSpec], spec: DataSpec) -> list[DatasetAttr]:
    """Descriptions of the data sets that a recipe names, in its order.

    A text is a name in `spec.directory`/dataset_info.json (or .yaml), else the path of a file or folder,
    absolute or relative to the directory or to the working folder, or an address (`remote.fetch`). What is elsewhere
    is fetched here. Raises DataError for names that are none of these, and for what cannot be fetched.
    """
    if is_remote(spec.directory):
        return [_at_address(ref, spec) for ref in refs]
    directory = Path(spec.directory)
    info = _load_info(directory) if any(isinstance(ref, str) for ref in refs) else (None, {})
    attrs = [
        _from_spec(ref, spec)
        if isinstance(ref, DatasetSpec)
        else _from_spec(DatasetSpec(cloud_file_name=ref), spec)
        if is_remote(ref)
        else _by_name(ref, *info, spec)
        for ref in refs
    ]
    return [replace(attr, media_directory=spec.media.directory or spec.directory) for attr in attrs]


def _at_address(ref: str | DatasetSpec, spec: DataSpec) -> DatasetAttr:
    """A data set below a directory that is elsewhere, whose dataset_info.json names it unless it is a file."""
    if isinstance(ref, DatasetSpec):
        return _from_spec(ref, spec)
    if PurePosixPath(ref).suffix.lower() in FILE_TYPES:
        return _from_spec(DatasetSpec(cloud_file_name=joined(spec.directory, ref)), spec)
    address = joined(spec.directory, INFO_NAMES[0])
    file = fetch(address, f"data.directory={spec.directory}", _cache(spec), offline=spec.offline)
    _, info = _load_info(file.parent)
    if ref not in info:
        near = difflib.get_close_matches(ref, list(info), n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(near)}?" if near else f"; it has {', '.join(list(info)[:8])}"
        raise DataError(f"data set {ref!r} is not in {address}{hint}")
    return _from_info(ref, info[ref], f"{address}: {ref}", spec)


def _cache(spec: DataSpec) -> Path:
    return Path(spec.cache).expanduser() if spec.cache else default_folder().parent


def _load_info(directory: Path) -> tuple[Path | None, dict[str, Any]]:
    """Path and content of dataset_info.json or .yaml; (None, {}) where there is none."""
    for name in INFO_NAMES:
        file = directory / name
        if not file.is_file():
            continue
        try:
            text = file.read_text(encoding="utf-8")
            info = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: not UTF-8 at byte {error.start}; convert it to UTF-8") from error
        except json.JSONDecodeError as error:
            place = f"line {error.lineno}, column {error.colno}"
            raise DataError(f"{file}, {place}: not JSON: {error.msg}") from error
        except yaml.YAMLError as error:
            raise DataError(f"{file}: not YAML: {error}") from error
        if not isinstance(info, dict):
            raise DataError(f"{file}: expected an object of data set names, found {type(info).__name__}")
        return file, info
    return None, {}


def _by_name(name: str, file: Path | None, info: dict[str, Any], spec: DataSpec) -> DatasetAttr:
    directory = Path(spec.directory)
    if name in info:
        return _from_info(name, info[name], f"{file}: {name}", spec)
    for path in (Path(name), directory / name):
        if path.exists():
            return _with_defaults(DatasetSpec(file_name=str(path)), path.stem, path)
    near = difflib.get_close_matches(name, list(info), n=3, cutoff=0.5)
    where = file or f"{directory / INFO_NAMES[0]} (which does not exist)"
    hint = (
        f"; did you mean {', '.join(near)}?"
        if near
        else f"; it has {', '.join(list(info)[:8])}"
        if info
        else ""
    )
    raise DataError(f"data set {name!r} is neither in {where} nor a file{hint}")


def _from_info(name: str, entry: Any, place: str, data: DataSpec) -> DatasetAttr:
    """One entry of dataset_info.json. Where it lists columns, the columns it leaves out are not read."""
    if not isinstance(entry, dict):
        raise DataError(f"{place}: expected an object, found {type(entry).__name__}")
    _no_unknown_keys(entry, _INFO_KEYS, place)
    _no_unknown_keys(entry.get("columns") or {}, set(ColumnSpec.model_fields), f"{place}.columns")
    _no_unknown_keys(entry.get("tags") or {}, set(TagSpec.model_fields), f"{place}.tags")
    origins: tuple[str, ...] = _ORIGINS
    if os.environ.get("USE_MODELSCOPE_HUB", "0").lower() in ("1", "true", "y"):
        origins = ("ms_hub_url", *_ORIGINS)
    origin = next((key for key in origins if entry.get(key) is not None), None)
    if origin is None:
        for key, why in _NOT_READ.items():
            if entry.get(key) is not None:
                raise DataError(f"{place}: {key} {why}")
        raise DataError(f"{place}: says nowhere where the data is; give file_name or hf_hub_url")
    fields = {
        key: entry[key]
        for key in (origin, "revision", "subset", "folder", "num_samples", "columns", "tags")
        if entry.get(key) is not None
    }
    fields |= {key: entry[key] for key in ("split", "formatting", "ranking") if key in entry}
    fields["dataset_sha1"] = entry.get("dataset_sha1") or entry.get("file_sha1")
    try:
        spec = DatasetSpec(name=name, **fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{place}.{'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from error
    attr = _from_spec(spec, data, beside_only=True)
    if "columns" not in fields:
        return attr
    return replace(attr, columns=spec.columns)


def _from_spec(spec: DatasetSpec, data: DataSpec, *, beside_only: bool = False) -> DatasetAttr:
    """A description with its files fetched. A path of dataset_info.json is relative to that file alone."""
    if spec.hf_hub_url is not None:
        name = spec.name or spec.hf_hub_url
        if data.offline:
            require_online(f"data set {name!r}", spec.hf_hub_url, offline=True)
        return _with_defaults(spec, name, None)
    if spec.ms_hub_url is not None:
        name = spec.name or spec.ms_hub_url
        folder = fetch_modelscope(spec.ms_hub_url, spec.revision, f"data set {name!r}", offline=data.offline)
        local = {"hf_hub_url": str(folder), "ms_hub_url": None, "revision": None}
        return _with_defaults(spec.model_copy(update=local), name, None)
    address = spec.cloud_file_name or joined(data.directory, str(spec.file_name))
    if spec.cloud_file_name is not None or is_remote(address):
        name = spec.name or PurePosixPath(address.rstrip("/")).stem
        return _with_defaults(
            spec, name, fetch(address, f"data set {name!r}", _cache(data), offline=data.offline)
        )
    file_name = str(spec.file_name)
    path = Path(data.directory) / file_name
    if not (path.exists() or beside_only) and Path(file_name).exists():
        path = Path(file_name)
    return _with_defaults(spec, spec.name or Path(file_name).stem, path)


def _with_defaults(spec: DatasetSpec, name: str, path: Path | None) -> DatasetAttr:
    defaults = DEFAULT_COLUMNS[spec.formatting]
    if spec.ranking:
        defaults = defaults.model_copy(update={"chosen": "chosen", "rejected": "rejected"})
    named = {key for key, value in spec.columns if value is not None}
    columns = defaults.model_copy(update={key: getattr(spec.columns, key) for key in named})
    if path is not None and path.suffix.lower() == ".txt" and "prompt" not in named:
        columns = ColumnSpec(prompt="text")
    tags = DEFAULT_TAGS[spec.formatting]
    if spec.tags is not None:
        tags = tags.model_copy(update=spec.tags.model_dump(include=spec.tags.model_fields_set))
    attr = DatasetAttr(
        name=name,
        load_from=_load_from(path),
        path=str(spec.hf_hub_url if path is None else path),
        dataset_sha1=spec.dataset_sha1,
        revision=spec.revision,
        subset=spec.subset,
        split=spec.split,
        folder=spec.folder,
        num_samples=spec.num_samples,
        ranking=spec.ranking,
        formatting=spec.formatting,
        columns=columns,
        tags=tags,
        named=frozenset(named),
    )
    _only_for_the_hub(attr)
    attr.files()
    return attr


def _load_from(path: Path | None) -> LoadFrom:
    if path is None:
        return "hub"
    return "script" if path.suffix == ".py" else "folder" if path.is_dir() else "file"


def _only_for_the_hub(attr: DatasetAttr) -> None:
    """Raise DataError where a file is described in words that only a data set on the hub has."""
    if attr.load_from == "hub":
        return
    given = {"subset": attr.subset, "folder": attr.folder, "revision": attr.revision}
    wrong = [key for key, value in given.items() if value is not None]
    if attr.split != "train":
        wrong.append("split")
    if wrong:
        raise DataError(
            f"data set {attr.name!r}: {wrong[0]} is for data sets on the hub, and {attr.path} is a "
            f"{attr.load_from}; leave it out, or name the file that holds those rows"
        )


def _no_unknown_keys(tree: Any, known: Iterable[str], place: str) -> None:
    if not isinstance(tree, dict):
        raise DataError(f"{place}: expected an object, found {type(tree).__name__}")
    for key in tree:
        if key not in known:
            near = difflib.get_close_matches(str(key), sorted(known), n=1, cutoff=0.0)
            raise DataError(f"{place}: unknown key {key!r}; did you mean {near[0]!r}?")
