"""Which checkpoints stay: room for the next one, and the last of the valid, the best and those being read."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from luthier.trainer.checkpoint import MANIFEST_NAME, discard, list_checkpoints, newest_valid
from luthier.types import CheckpointError

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

SPARE_BYTES = 16 * 2**20
"""Room beside the tensors: tokenizer, state, manifest, and what the file system itself needs."""


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """While a checkpoint is read, no run deletes it (a shared lock on its manifest; not on Windows)."""
    manifest = folder / MANIFEST_NAME
    if fcntl is None or not manifest.is_file():
        yield
        return
    with manifest.open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_SH)
        yield


def _is_read(folder: Path) -> bool:
    """Whether somebody holds the lock of `reading`."""
    manifest = folder / MANIFEST_NAME
    if fcntl is None or not manifest.is_file():
        return False
    with manifest.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def rotate(run_dir: Path, limit: int | None, best: Path | None, *, valid: Path | None = None) -> list[Path]:
    """Delete the oldest checkpoints until `limit` are left.

    Never `best`, never the newest valid one, never one that is being read. Where no checkpoint is valid, or
    `limit` is None, nothing is deleted. `valid` is one that was hashed this moment and need not be verified
    again. Returns the deleted ones.
    """
    checkpoints = list_checkpoints(run_dir)
    if limit is None or len(checkpoints) <= limit:
        return []
    newest = valid or newest_valid(run_dir)[0]
    if newest is None:
        return []
    kept = {newest.resolve()} | ({best.resolve()} if best is not None else set())
    spare = [folder for folder in checkpoints if folder.resolve() not in kept and not _is_read(folder)]
    deleted = spare[: len(checkpoints) - limit]
    for folder in deleted:
        discard(folder)
    return deleted


def require_space(run_dir: Path, name: str, num_bytes: int) -> None:
    """Raise CheckpointError where `name` cannot be written beside the others: nothing is begun then."""
    needed = num_bytes + SPARE_BYTES
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise CheckpointError(
            f"no room for {name} in {run_dir}: {_size(needed)} are needed and {_size(free)} are free. "
            f"{what_is_left(run_dir)}"
        )


def what_is_left(run_dir: Path, then: str = "make room and ") -> str:
    """What a run that stopped can go on from, in one sentence; `then` is what must be done first."""
    newest, _ = newest_valid(run_dir, resumable=True)
    if newest is None:
        return "This run has no checkpoint yet"
    return f"{newest.name} is whole; {then}go on from it with train.resume=auto"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB" if num_bytes < 2**30 else f"{num_bytes / 2**30:,.1f} GiB"
