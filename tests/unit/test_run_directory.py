"""What a run does with its checkpoints and its folder: resume, rotate, refuse, overwrite."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from luthier.trainer.checkpoint import (
    atomic_folder,
    list_checkpoints,
    newest_valid,
    resolve_resume,
    tree_fingerprint,
)
from luthier.trainer.retention import rotate
from luthier.trainer.run_directory import run_guard
from luthier.types import CheckpointError

WEIGHTS = bytes(range(256))


def write(run_dir: Path, step: int, *, metadata: dict[str, object] | None = None) -> Path:
    final = run_dir / f"checkpoint-{step}"
    with atomic_folder(final, metadata={"step": step} | (metadata or {})) as folder:
        (folder / "weights.bin").write_bytes(WEIGHTS + str(step).encode())
    return final


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def damage(folder: Path) -> None:
    path = folder / "weights.bin"
    path.write_bytes(b"\xff" + path.read_bytes()[1:])


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# --------------------------------------------------------------------------------------------------
# Resuming


def test_resume_never_and_auto_without_checkpoints_start_anew(tmp_path: Path) -> None:
    assert resolve_resume(tmp_path, "auto") == (None, [])
    write(tmp_path, 1)
    assert resolve_resume(tmp_path, "never") == (None, [])


def test_resume_from_a_path(tmp_path: Path) -> None:
    first, _ = write(tmp_path, 1), write(tmp_path, 2)
    assert resolve_resume(tmp_path / "elsewhere", str(first)) == (first, [])
    with pytest.raises(CheckpointError, match="there is no such folder"):
        resolve_resume(tmp_path, str(tmp_path / "checkpoint-3"))
    with pytest.raises(CheckpointError, match=r"is a run; name one of its checkpoints, as .*checkpoint-2"):
        resolve_resume(tmp_path, str(tmp_path))


def test_auto_does_not_start_anew_over_damaged_checkpoints(tmp_path: Path) -> None:
    for step in (1, 2):
        damage(write(tmp_path, step))
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints") as raised:
        resolve_resume(tmp_path, "auto")
    assert "checkpoint-1/weights.bin" in str(raised.value)
    assert "checkpoint-2/weights.bin" in str(raised.value)


def test_weights_alone_are_valid_but_not_resumed(tmp_path: Path) -> None:
    whole = write(tmp_path, 1)
    weights = write(tmp_path, 2, metadata={"resumable": False})
    assert newest_valid(tmp_path) == (weights, [])
    found, skipped = resolve_resume(tmp_path, "auto")
    assert found == whole
    assert [folder for folder, _ in skipped] == [weights]
    assert "save_only_model" in skipped[0][1]
    with pytest.raises(CheckpointError, match="save_only_model"):
        resolve_resume(tmp_path, str(weights))


# --------------------------------------------------------------------------------------------------
# Rotation


def test_the_oldest_go_first(tmp_path: Path) -> None:
    folders = [write(tmp_path, step) for step in (5, 10, 100)]
    os.utime(folders[0])  # order is by number, not by time
    assert rotate(tmp_path, 2, None) == [folders[0]]
    assert list_checkpoints(tmp_path) == folders[1:]
    assert rotate(tmp_path, None, None) == []


@settings(max_examples=60, deadline=None)
@given(
    health=st.lists(st.booleans(), min_size=1, max_size=6),
    limit=st.integers(1, 6),
    best=st.none() | st.integers(0, 5),
)
def test_rotation_keeps_the_best_the_newest_valid_and_no_more_than_the_limit(
    tmp_path_factory: pytest.TempPathFactory, health: list[bool], limit: int, best: int | None
) -> None:
    run = tmp_path_factory.mktemp("run")
    folders = [write(run, step) for step in range(len(health))]
    for folder, healthy in zip(folders, health, strict=True):
        if not healthy:
            damage(folder)
    best_folder = folders[best] if best is not None and best < len(folders) else None
    deleted = rotate(run, limit, best_folder)
    left = list_checkpoints(run)

    assert sorted(deleted + left) == sorted(folders)
    assert names(run) == {name for folder in left for name in (folder.name, *_below(run, folder))}
    valid = [folder for folder, healthy in zip(folders, health, strict=True) if healthy]
    if not valid:
        assert deleted == []
        return
    kept = {valid[-1]} | ({best_folder} if best_folder else set())
    assert kept <= set(left)
    spare = [folder for folder in folders if folder not in kept]
    assert deleted == spare[: len(deleted)]  # oldest first
    assert len(left) == min(len(folders), max(limit, len(kept)))


def _below(run: Path, folder: Path) -> set[str]:
    return {f"{folder.name}/{name}" for name in names(folder)}


# --------------------------------------------------------------------------------------------------
# The run directory


def make_run(output: Path) -> None:
    output.mkdir(parents=True)
    for name in ("recipe.yaml", "trainer_log.jsonl", "adapter_model.safetensors", "training_loss.png"):
        (output / name).write_text(name)
    write(output, 1)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_new_or_empty_folder_is_free(tmp_path: Path, overwrite: bool) -> None:
    run_guard(tmp_path / "new", overwrite=overwrite, resume="never")
    assert not (tmp_path / "new").exists()
    run_guard(tmp_path, overwrite=overwrite, resume="auto")


def test_a_run_is_never_overwritten_unasked(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    before = tree_fingerprint(tmp_path)
    with pytest.raises(CheckpointError, match=r"train\.overwrite=true .*train\.resume=auto"):
        run_guard(tmp_path / "run", overwrite=False, resume="never")
    run_guard(tmp_path / "run", overwrite=False, resume="auto")
    run_guard(tmp_path / "run", overwrite=False, resume=str(tmp_path / "run" / "checkpoint-1"))
    with pytest.raises(CheckpointError, match="give one of the two"):
        run_guard(tmp_path / "run", overwrite=True, resume="auto")
    assert tree_fingerprint(tmp_path) == before


@pytest.mark.parametrize("marker", ["recipe.yaml", "trainer_log.jsonl", "checkpoint-3"])
def test_each_mark_alone_makes_a_run(tmp_path: Path, marker: str) -> None:
    (tmp_path / marker).write_text("")
    with pytest.raises(CheckpointError, match="holds a run already"):
        run_guard(tmp_path, overwrite=False, resume="never")
    run_guard(tmp_path, overwrite=True, resume="never")
    assert list(tmp_path.iterdir()) == []


def test_overwriting_removes_what_a_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    output = tmp_path / "run"
    make_run(output)
    (output / "notes.txt").write_text("mine")
    (output / "config.json").mkdir()
    (output / "data").mkdir()
    (output / f".tmp-checkpoint-2-{dead_pid()}").mkdir()
    run_guard(output, overwrite=True, resume="never")
    assert names(output) == {"notes.txt", "config.json", "data"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("resume", ["never", "auto"])
def test_a_folder_of_other_files_is_refused(tmp_path: Path, overwrite: bool, resume: str) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "README.md").write_text("read me")
    with pytest.raises(CheckpointError, match=r"is not a run but holds other files \(thesis\.tex\)"):
        run_guard(tmp_path, overwrite=overwrite, resume=resume)
    assert names(tmp_path) == {"thesis.tex", "README.md"}


def test_home_and_the_working_folder_are_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "users" / "me"
    make_run(home)
    make_run(tmp_path / "work")
    (tmp_path / "users" / "recipe.yaml").write_text("")
    before = tree_fingerprint(tmp_path)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path / "work")
    for output in (home, home.parent, Path()):
        with pytest.raises(CheckpointError, match="it is not overwritten"):
            run_guard(output, overwrite=True, resume="never")
    assert tree_fingerprint(tmp_path) == before


def test_a_file_and_another_runs_checkpoint_are_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "b")
    with pytest.raises(CheckpointError, match="is a file"):
        run_guard(tmp_path / "a" / "recipe.yaml", overwrite=True, resume="never")
    with pytest.raises(CheckpointError, match="is not a checkpoint of the run"):
        run_guard(tmp_path / "b", overwrite=False, resume=str(tmp_path / "a" / "checkpoint-1"))
