"""The bar of answers that are sampled: on a terminal alone, and gone with the last answer."""

from __future__ import annotations

from io import StringIO

import pytest

from luthier.trainer.callbacks import ProgressCallback


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def shown(file: StringIO, monkeypatch: pytest.MonkeyPatch, *, quiet: bool = False) -> str:
    monkeypatch.setenv("TERM", "xterm")
    with ProgressCallback(quiet=quiet, file=file) as progress:
        progress.answered(0, 24)
        progress.answered(7, 24)
        assert progress._progress is None or len(progress._progress.tasks) == 1
        progress.answered(24, 24)
        assert progress._progress is None or not progress._progress.tasks
        progress.answered(0, 8)  # the next rollout's
    return file.getvalue()


def test_a_terminal_sees_how_many_answers_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(Terminal(), monkeypatch)
    assert "answers" in text
    assert "0/8" in text


def test_others_see_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(StringIO(), monkeypatch) == ""
    assert shown(Terminal(), monkeypatch, quiet=True) == ""
