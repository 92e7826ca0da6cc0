"""Checkpoint folders: atomic, hashed, verified, rotated; and the guard of the run directory."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import assume, given, settings, strategies as st

from luthier.trainer.checkpoint import (
    atomic_folder,
    hash_file,
    list_checkpoints,
    newest_valid,
    read_manifest,
    resolve_resume,
    sweep_temporary,
    tree_fingerprint,
    verify,
)
from luthier.types import CheckpointError

WEIGHTS = bytes(range(256)) * 64


def write(run_dir: Path, step: int, *, metadata: dict[str, object] | None = None) -> Path:
    final = run_dir / f"checkpoint-{step}"
    with atomic_folder(final, metadata={"step": step} | (metadata or {})) as folder:
        (folder / "weights.bin").write_bytes(WEIGHTS + str(step).encode())
        (folder / "state").mkdir()
        (folder / "state" / "rng.json").write_text("[1, 2, 3]")
    return final


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def damage(folder: Path) -> None:
    path = folder / "weights.bin"
    path.write_bytes(b"\xff" + path.read_bytes()[1:])


# --------------------------------------------------------------------------------------------------
# Writing and hashing


def test_the_folder_appears_whole_with_a_manifest(tmp_path: Path) -> None:
    final = write(tmp_path, 3)
    assert names(tmp_path) == {
        "checkpoint-3",
        "checkpoint-3/manifest.json",
        "checkpoint-3/state",
        "checkpoint-3/state/rng.json",
        "checkpoint-3/weights.bin",
    }
    content = WEIGHTS + b"3"
    manifest = json.loads((final / "manifest.json").read_text())
    assert manifest["version"] == 1
    assert manifest["metadata"] == {"step": 3}
    assert manifest["files"] == [
        {"path": "state/rng.json", "size": 9, "sha256": hashlib.sha256(b"[1, 2, 3]").hexdigest()},
        {"path": "weights.bin", "size": len(content), "sha256": hashlib.sha256(content).hexdigest()},
    ]
    assert "digest" not in read_manifest(final)
    verify(final)


def test_nothing_is_seen_under_the_final_name_before_the_end(tmp_path: Path) -> None:
    final = tmp_path / "checkpoint-1"
    with atomic_folder(final, metadata={}) as folder:
        (folder / "a").write_text("a")
        assert not final.exists()
        assert folder.name == f".tmp-checkpoint-1-{os.getpid()}"
        assert list_checkpoints(tmp_path) == []
    assert names(final) == {"a", "manifest.json"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_nothing_new_and_all_that_was(tmp_path: Path, error: type[BaseException]) -> None:
    final = write(tmp_path, 1)
    before = tree_fingerprint(tmp_path)
    with pytest.raises(error), atomic_folder(final, metadata={}, replace=True) as folder:
        (folder / "half").write_text("written")
        raise error
    assert tree_fingerprint(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_an_existing_folder_is_replaced_only_if_told(tmp_path: Path) -> None:
    final = write(tmp_path, 1)
    with pytest.raises(CheckpointError, match="checkpoint-1 exists already"):
        write(tmp_path, 1)
    verify(final)
    with atomic_folder(final, metadata={"new": True}, replace=True) as folder:
        (folder / "b").write_text("b")
        verify(final)  # the old one is whole until the new one is
    verify(final)
    assert names(tmp_path) == {"checkpoint-1", "checkpoint-1/b", "checkpoint-1/manifest.json"}


def test_a_failed_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = write(tmp_path, 1)
    before = tree_fingerprint(tmp_path)
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if Path(source).name.startswith(".tmp-"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with (
        pytest.raises(OSError, match="Input/output"),
        atomic_folder(final, metadata={}, replace=True) as folder,
    ):
        (folder / "b").write_text("b")
    assert tree_fingerprint(tmp_path) == before


def test_every_file_and_folder_is_synced_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def recording_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(path.relative_to(tmp_path).as_posix().replace(f".tmp-checkpoint-1-{os.getpid()}", "T"))
        fsync(descriptor)

    def recording_rename(source: Path, target: Path) -> None:
        events.append("rename")
        rename(source, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to see which file is synced")
    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "rename", recording_rename)
    write(tmp_path, 1)
    middle = events.index("rename")
    assert sorted(events[:middle]) == ["T", "T/manifest.json", "T/state", "T/state/rng.json", "T/weights.bin"]
    assert events[middle:] == ["rename", "."]


def test_hashes_are_sha256_and_a_fingerprint_sees_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert (
        hash_file(tmp_path / "a" / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
    first = tree_fingerprint(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").write_bytes(b"abc")
    os.utime(tmp_path / "b" / "x", (1, 1))
    assert tree_fingerprint(tmp_path / "b") == first
    (tmp_path / "b" / "x").write_bytes(b"abd")
    assert tree_fingerprint(tmp_path / "b") != first
    (tmp_path / "b" / "x").rename(tmp_path / "b" / "y")
    (tmp_path / "b" / "y").write_bytes(b"abc")
    assert tree_fingerprint(tmp_path / "b") != first
    with pytest.raises(CheckpointError, match="does not exist"):
        tree_fingerprint(tmp_path / "none")


# --------------------------------------------------------------------------------------------------
# Killed in the middle

WRITER = """
import sys, time
from pathlib import Path
from luthier.trainer.checkpoint import atomic_folder
with atomic_folder(Path(sys.argv[1]), metadata={}) as folder:
    (folder / "weights.bin").write_bytes(b"half")
    print(folder, flush=True)
    time.sleep(120)
"""


def start_writer(final: Path) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(final)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_after_kill_9_the_previous_checkpoint_is_used_and_the_rest_swept(tmp_path: Path) -> None:
    previous = write(tmp_path, 10)
    process, temporary = start_writer(tmp_path / "checkpoint-20")
    try:
        assert temporary.name == f".tmp-checkpoint-20-{process.pid}"
        assert (temporary / "weights.bin").read_bytes() == b"half"
        # A sweep by somebody else leaves the writer's folder alone while it lives.
        assert sweep_temporary(tmp_path) == []
        assert temporary.is_dir()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert temporary.is_dir()
    assert not (tmp_path / "checkpoint-20").exists()
    assert resolve_resume(tmp_path, "auto") == (previous, [])
    assert sweep_temporary(tmp_path) == [temporary]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]
    assert write(tmp_path, 20) == newest_valid(tmp_path)[0]


LOOP = """
import os, sys
from pathlib import Path
from luthier.trainer.checkpoint import atomic_folder
run = Path(sys.argv[1])
print("go", flush=True)
step = 0
while True:
    with atomic_folder(run / f"checkpoint-{step % 4}", metadata={}, replace=True) as folder:
        for part in range(5):
            (folder / f"part-{part}").write_bytes(os.urandom(20_000))
    step += 1
"""


def test_kill_9_at_any_moment_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    moments = random.Random(0)
    swept = []
    for _ in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", LOOP, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(moments.uniform(0.05, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        swept += sweep_temporary(tmp_path)
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
        for folder in list_checkpoints(tmp_path):
            verify(folder)
    assert list_checkpoints(tmp_path)
    assert swept, "no kill fell into a write: this test has shown nothing"


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_folder_that_was_aside_gets_its_name_back(tmp_path: Path) -> None:
    final = write(tmp_path, 5)
    aside = tmp_path / f".old-checkpoint-5-{dead_pid()}"
    final.rename(aside)  # killed between the two renames of a replacement
    assert sweep_temporary(tmp_path) == [aside]
    verify(final)
    leftover = tmp_path / f".old-checkpoint-5-{dead_pid()}"
    leftover.mkdir()  # killed after the second rename: the new one is in place
    assert sweep_temporary(tmp_path) == [leftover]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    verify(final)


def test_a_living_process_with_a_dead_writers_id_does_not_keep_its_folder(tmp_path: Path) -> None:
    leftover = tmp_path / f".tmp-checkpoint-5-{os.getpid()}"
    leftover.mkdir()
    assert sweep_temporary(tmp_path) == []
    os.utime(leftover, (1_000_000_000, 1_000_000_000))  # written in 2001, long before this process began
    assert sweep_temporary(tmp_path) == [leftover]


def test_sweeping_touches_nothing_else(tmp_path: Path) -> None:
    for name in (".tmp-notes", ".tmp-a-b", ".git", "tmp-checkpoint-1-999999999"):
        (tmp_path / name).mkdir()
    before = names(tmp_path)
    assert sweep_temporary(tmp_path) == []
    assert names(tmp_path) == before
    assert sweep_temporary(tmp_path / "absent") == []


# --------------------------------------------------------------------------------------------------
# Damage


def rewrite(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing file": (lambda f: (f / "weights.bin").unlink(), r"weights\.bin is missing"),
    "missing in a folder": (lambda f: (f / "state" / "rng.json").unlink(), r"state/rng\.json is missing"),
    "cut file": (
        lambda f: (f / "weights.bin").write_bytes(WEIGHTS),
        rf"weights\.bin has a size of {len(WEIGHTS)} bytes; {len(WEIGHTS) + 2} were",
    ),
    "emptied file": (lambda f: (f / "weights.bin").write_bytes(b""), r"weights\.bin has a size of 0 bytes"),
    "grown file": (
        lambda f: (f / "state" / "rng.json").write_text("[1, 2, 3]\n"),
        r"rng\.json has a size of 10 bytes; 9 were",
    ),
    "one changed byte": (damage, r"weights\.bin is damaged: its SHA-256 is [0-9a-f]{64}; [0-9a-f]{64} was"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), r"has no manifest\.json"),
    "cut manifest": (
        lambda f: (f / "manifest.json").write_bytes((f / "manifest.json").read_bytes()[:-40]),
        r"manifest\.json is damaged",
    ),
    "binary manifest": (
        lambda f: (f / "manifest.json").write_bytes(b"\xff\x00"),
        r"manifest\.json is damaged",
    ),
    "another JSON": (
        lambda f: (f / "manifest.json").write_text("[]"),
        r"manifest\.json is damaged: it is no",
    ),
    "file taken off the manifest": (
        lambda f: rewrite(f, lambda m: m.update(files=[])),
        r"manifest\.json is damaged: its content does not match",
    ),
    "metadata changed": (
        lambda f: rewrite(f, lambda m: m.update(metadata={"step": 8})),
        r"manifest\.json is damaged: its content does not match",
    ),
    "digest taken off": (lambda f: rewrite(f, lambda m: m.pop("digest")), r"does not match its own digest"),
    "newer version": (
        lambda f: rewrite(f, lambda m: m.update(version=2)),
        r"format version 2; this Luthier reads 1",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_every_damage_is_named_skipped_and_refused(tmp_path: Path, kind: str) -> None:
    change, message = DAMAGES[kind]
    older, newer = write(tmp_path, 9), write(tmp_path, 10)
    change(newer)
    with pytest.raises(CheckpointError, match=message) as raised:
        verify(newer)
    assert newest_valid(tmp_path) == (older, [(newer, str(raised.value))])
    assert resolve_resume(tmp_path, "auto") == (older, [(newer, str(raised.value))])
    with pytest.raises(CheckpointError, match=message):
        resolve_resume(tmp_path, str(newer))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_single_changed_byte_is_found(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = write(tmp_path_factory.mktemp("run"), 1)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    if path.name == "manifest.json":
        before = json.loads(path.read_bytes())
        try:
            changed = json.loads(bytes(content)) != before
        except ValueError:
            changed = True
        assume(changed)  # one white-space character for another is the same manifest
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=path.name.replace(".", r"\.")):
        verify(folder)


def test_checkpoints_are_ordered_by_number_and_foreign_names_ignored(tmp_path: Path) -> None:
    written = [write(tmp_path, step) for step in (100, 9, 20)]
    (tmp_path / "checkpoint-final").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert list_checkpoints(tmp_path) == [written[1], written[2], written[0]]
    assert newest_valid(tmp_path) == (written[0], [])
    assert newest_valid(tmp_path / "absent") == (None, [])
