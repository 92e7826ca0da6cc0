"""Room is asked for first; what is read, best or last stays."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from luthier.trainer.checkpoint import atomic_folder
from luthier.trainer.retention import reading, require_space, rotate, what_is_left
from luthier.types import CheckpointError


def write(run_dir: Path, step: int) -> Path:
    folder = run_dir / f"checkpoint-{step}"
    with atomic_folder(folder, metadata={"step": step}) as inside:
        (inside / "weights").write_bytes(b"w" * step)
    return folder


def test_a_checkpoint_that_is_read_is_not_deleted(tmp_path: Path) -> None:
    folders = [write(tmp_path, step) for step in (1, 2, 3, 4)]
    with reading(folders[0]):
        assert rotate(tmp_path, 2, None) == folders[1:3]
    assert rotate(tmp_path, 1, None) == folders[:1]


def test_another_process_that_reads_keeps_it_too(tmp_path: Path) -> None:
    folders = [write(tmp_path, step) for step in (1, 2)]
    code = (
        "import sys; from pathlib import Path; from luthier.trainer.retention import reading\n"
        "with reading(Path(sys.argv[1])):\n    print('reads', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folders[0])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    ) as reader:
        assert reader.stdout is not None and reader.stdout.readline() == "reads\n"
        assert rotate(tmp_path, 1, None) == []
        reader.kill()  # a killed reader holds nothing
        reader.wait()
    assert rotate(tmp_path, 1, None) == folders[:1]


def test_no_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100 * 2**20))
    require_space(tmp_path, "checkpoint-3", 84 * 2**20)
    write(tmp_path, 2)
    with pytest.raises(CheckpointError) as caught:
        require_space(tmp_path, "checkpoint-3", 85 * 2**20)
    assert str(caught.value) == (
        f"no room for checkpoint-3 in {tmp_path}: 101 MiB are needed and 100 MiB are free. "
        "checkpoint-2 is whole; make room and go on from it with train.resume=auto"
    )
    with pytest.raises(CheckpointError, match=r"2\.0 GiB are needed"):
        require_space(tmp_path, "checkpoint-3", 2 * 2**30)


def test_what_is_left_is_what_can_be_resumed(tmp_path: Path) -> None:
    assert what_is_left(tmp_path) == "This run has no checkpoint yet"
    write(tmp_path, 1)
    damaged = write(tmp_path, 2)
    (damaged / "weights").write_bytes(b"x")
    assert what_is_left(tmp_path).startswith("checkpoint-1 is whole")
