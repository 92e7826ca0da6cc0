"""Checkpoints as folders of files: written atomically, hashed, verified. Nothing here knows a model.

A folder exists under its final name only when every byte of it is on the disk, together with a
`manifest.json` that holds the size and SHA-256 of each file. Until then it is `.tmp-<name>-<pid>` beside it,
so a killed process leaves the earlier checkpoints as they were.

    .tmp-<name>-<pid>   being written by process <pid>
    .old-<name>-<pid>   the folder that process <pid> is replacing
    .del-<name>-<pid>   being deleted by process <pid>
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from luthier.types import CheckpointError

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1

_TEMPORARY = re.compile(r"\.(?P<kind>tmp|old|del)-(?P<name>.+)-(?P<pid>\d+)")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_CLOCK_SLACK = 60.0
"""Seconds by which a process's start time and a file's time may disagree."""


# --------------------------------------------------------------------------------------------------
# Hashes


def hash_file(path: Path) -> str:
    """SHA-256 of the file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def list_files(folder: Path) -> list[Path]:
    """Every file below `folder`, in the order of its relative POSIX path."""
    return sorted(
        (p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.relative_to(folder).as_posix()
    )


def tree_fingerprint(path: Path) -> str:
    """One SHA-256 for a file or a folder: names, sizes and contents of all files, nothing of times or owners.

    Raises CheckpointError where `path` does not exist.
    """
    if path.is_file():
        return _digest([["", path.stat().st_size, hash_file(path)]])
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist, so it has no fingerprint")
    return _digest([[e["path"], e["size"], e["sha256"]] for e in _file_entries(path)])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _file_entries(folder: Path) -> list[dict[str, Any]]:
    return [
        {"path": p.relative_to(folder).as_posix(), "size": p.stat().st_size, "sha256": hash_file(p)}
        for p in list_files(folder)
    ]


# --------------------------------------------------------------------------------------------------
# Writing


@contextmanager
def atomic_folder(
    final: Path,
    *,
    metadata: Mapping[str, Any],
    replace: bool = False,
    otherwise: Callable[[Path], Path | None] | None = None,
) -> Iterator[Path]:
    """A folder to write into that becomes `final` only if the block ends well.

    `metadata` (JSON values) is kept in the manifest; `{"resumable": False}` marks a folder that holds no
    training state. `otherwise` is asked once everything is written, and may name another folder to become. After an
    exception in the block nothing is left and an earlier `final` is untouched.

    Raises CheckpointError where `final` exists and `replace` is not given, OSError where writing fails.
    """
    final = final.absolute()
    if os.path.lexists(final) and not replace:
        raise CheckpointError(f"{final} exists already and is not replaced; move it away first")
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(final, "tmp")
    if temporary.exists():  # of a dead process that had our id: a container restarts with the same ids
        shutil.rmtree(temporary)
    temporary.mkdir()
    try:
        yield temporary
        _write_manifest(temporary, metadata)
        for path in list_files(temporary):
            _sync(path)
        for folder in [*(p for p in temporary.rglob("*") if p.is_dir()), temporary]:
            _sync(folder)
        chosen = otherwise(temporary) if otherwise is not None else None
        _put_in_place(temporary, final if chosen is None else chosen.absolute())
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_manifest(folder: Path, metadata: Mapping[str, Any]) -> None:
    manifest = {"version": MANIFEST_VERSION, "files": _file_entries(folder), "metadata": dict(metadata)}
    manifest["digest"] = _digest(manifest)
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _put_in_place(temporary: Path, final: Path) -> None:
    """Rename; an existing folder steps aside first, for a rename cannot replace a folder with files in it."""
    aside = _sibling(final, "old")
    if os.path.lexists(aside):
        _remove(aside)
    if os.path.lexists(final):
        os.rename(final, aside)
    try:
        os.rename(temporary, final)
    except BaseException:
        if os.path.lexists(aside):
            os.rename(aside, final)
        raise
    _sync(final.parent)
    if os.path.lexists(aside):
        _remove(aside)


def _sibling(final: Path, kind: str) -> Path:
    return final.parent / f".{kind}-{final.name}-{os.getpid()}"


def _sync(path: Path) -> None:
    """Have the disk confirm a file's bytes, or a folder's names (folders cannot be opened on Windows)."""
    if path.is_dir() and os.name == "nt":
        return
    # Windows confirms only what is open for writing, POSIX opens folders only for reading.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def discard(folder: Path) -> None:
    """Delete a checkpoint so that no half-deleted one is ever found under its name."""
    aside = _sibling(folder, "del")
    if os.path.lexists(aside):
        _remove(aside)
    os.rename(folder, aside)
    _remove(aside)


def is_temporary(name: str) -> bool:
    """Whether `name` is one that writing, replacing or deleting a folder uses for a while."""
    return _TEMPORARY.fullmatch(name) is not None


def sweep_temporary(run_dir: Path) -> list[Path]:
    """Clear what dead processes left in `run_dir`; folders of living ones stay. Returns what was cleared.

    A folder that was aside while its replacement was put in place gets its name back if that did not happen.
    """
    cleared = []
    for path in sorted(run_dir.iterdir()) if run_dir.is_dir() else []:
        match = _TEMPORARY.fullmatch(path.name)
        if match is None or _is_alive(int(match["pid"]), path):
            continue
        final = run_dir / match["name"]
        if match["kind"] == "old" and not os.path.lexists(final):
            os.rename(path, final)
        else:
            _remove(path)
        cleared.append(path)
    return cleared


def _is_alive(pid: int, folder: Path) -> bool:
    """Whether the process that made `folder` lives; one that started after it only has the same id."""
    try:
        process = psutil.Process(pid)
        started, status = process.create_time(), process.status()
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
    return status != psutil.STATUS_ZOMBIE and started <= folder.lstat().st_mtime + _CLOCK_SLACK


# --------------------------------------------------------------------------------------------------
# Verifying


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder: version, files, metadata. Raises CheckpointError if absent or damaged."""
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {MANIFEST_NAME}: it was not written whole, or not by Luthier")
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(manifest, dict) or "version" not in manifest:
        raise CheckpointError(f"{path} is damaged: it is no manifest")
    if manifest["version"] != MANIFEST_VERSION:
        raise CheckpointError(
            f"{path} has format version {manifest['version']!r}; this Luthier reads {MANIFEST_VERSION}"
        )
    digest = manifest.pop("digest", None)
    if digest != _digest(manifest):
        raise CheckpointError(f"{path} is damaged: its content does not match its own digest")
    return manifest


def verify(folder: Path) -> None:
    """Check every file of a folder against its manifest; other files in it are not looked at.

    Raises CheckpointError that names the first file that differs, and how: missing, size or SHA-256.
    """
    entries = [(folder / entry["path"], entry) for entry in read_manifest(folder)["files"]]
    # All sizes before the first hash: a cut file is found at once, whatever its place.
    for path, entry in entries:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != entry["size"]:
            raise CheckpointError(
                f"{path} has a size of {path.stat().st_size} bytes; {entry['size']} were written"
            )
    for path, entry in entries:
        found = hash_file(path)
        if found != entry["sha256"]:
            raise CheckpointError(f"{path} is damaged: its SHA-256 is {found}; {entry['sha256']} was written")


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The folders `checkpoint-N` of a run, by N ascending, valid or not."""
    numbered = []
    for path in run_dir.iterdir() if run_dir.is_dir() else []:
        match = _CHECKPOINT.fullmatch(path.name)
        if match is not None and path.is_dir():
            numbered.append((int(match[1]), path))
    return [path for _, path in sorted(numbered)]


def newest_valid(run_dir: Path, *, resumable: bool = False) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The highest `checkpoint-N` that verifies, and the higher ones that were skipped, each with the reason.

    With `resumable`, checkpoints that hold weights alone are skipped too.
    """
    skipped = []
    for folder in reversed(list_checkpoints(run_dir)):
        try:
            _check(folder, resumable)
        except CheckpointError as error:
            skipped.append((folder, str(error)))
        else:
            return folder, skipped
    return None, skipped


def _check(folder: Path, resumable: bool) -> None:
    verify(folder)
    if resumable and read_manifest(folder)["metadata"].get("resumable") is False:
        raise CheckpointError(
            f"{folder} holds weights alone (train.save_only_model), so training cannot go on from it"
        )


def resolve_resume(run_dir: Path, resume: str) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The verified checkpoint to go on from, or None to start anew; and what `auto` skipped, with reasons.

    `resume` is `never`, `auto` or a path. Raises CheckpointError where the named checkpoint is damaged, and
    where `auto` finds checkpoints but no usable one: starting from nothing would then lose them quietly.
    """
    if resume == "never":
        return None, []
    if resume != "auto":
        folder = Path(resume)
        if not folder.is_dir():
            raise CheckpointError(f"train.resume={resume}: there is no such folder")
        inside = list_checkpoints(folder)
        if inside and not (folder / "trainer_state.json").is_file():
            raise CheckpointError(
                f"train.resume={resume} is a run; name one of its checkpoints, as {inside[-1]}"
            )
        try:
            _check(folder, resumable=True)
        except CheckpointError as error:
            raise CheckpointError(f"train.resume={resume} cannot be used: {error}") from error
        return folder, []
    found, skipped = newest_valid(run_dir, resumable=True)
    if found is None and skipped:
        reasons = "".join(f"\n  {reason}" for _, reason in skipped)
        raise CheckpointError(
            f"train.resume=auto: none of the {len(skipped)} checkpoints in {run_dir} can be used; "
            f"train.overwrite=true with train.resume=never starts anew.{reasons}"
        )
    return found, skipped
