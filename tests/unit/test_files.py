"""A file that is written is there whole, or as it was before."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from luthier.files import write_whole


def test_text_and_bytes_replace_what_is_there(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    write_whole(file, "é\n")
    assert file.read_bytes() == b"\xc3\xa9\n"
    write_whole(file, b"\x00\r\n")
    assert file.read_bytes() == b"\x00\r\n"
    assert list(tmp_path.iterdir()) == [file]


def test_what_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.txt"
    write_whole(file, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(file, "new")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
