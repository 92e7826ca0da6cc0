"""Rows that several processes encode: the same table, and nothing left behind however it ends."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from luthier.data import row_batches, workers
from luthier.data.encode import EncodeOptions, sft_sample
from luthier.data.prepare import Preparation, PreparedData, prepare
from luthier.data.template import load_template
from luthier.recipe.schema import DatasetSpec, DataSpec
from luthier.samples import Encoded
from luthier.types import DataError, Row
from tiny_tokenizers import byte_level

TEMPLATE_TOKENS = ("<|im_start|>", "<|im_end|>")
ROWS = 240


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows of which some are dropped, split or learn nothing; every batch goes to others as soon as they are there."""
    monkeypatch.setattr(row_batches, "_ROWS", 8)
    monkeypatch.setattr(workers, "_ALONE", 0.0)
    made = tmp_path / "rows.jsonl"
    with made.open("w", encoding="utf-8") as stream:
        for k in range(ROWS):
            said = "" if k % 17 == 5 else f"Answer {k}, né: " + "word " * (k % 60)
            role = "nobody" if k % 31 == 7 else "assistant"
            turns = [{"role": "user", "content": f"Question {k}"}, {"role": role, "content": said}]
            stream.write(json.dumps({"messages": turns}, ensure_ascii=bool(k % 2)) + "\n" * (1 + k % 2))
    return made


def prepared(file: Path, processes: int, encode: Callable[..., Encoded] | None = None) -> PreparedData:
    spec = DataSpec(
        train=(DatasetSpec(file_name=str(file), formatting="openai"),),
        template="chatml",
        max_length=64,
        overflow="split",
        workers=processes,
        cache=str(file.parent / f"cache{processes}"),
    )
    encode = encode or partial(sft_sample, options=EncodeOptions.of(spec, "sft"))
    template = load_template(byte_level(TEMPLATE_TOKENS), spec)
    return prepare(spec, Preparation(encode, template, "conversation", {"stage": "sft"}, seed=0))


def content(data: PreparedData) -> list[Any]:
    return [(s.index, s.input_ids.tolist(), s.weights.tolist()) for s in data.train] + [
        data.train.rows.tolist(),
        data.reports,
    ]


class Noted:
    """Which batches other processes have answered; nothing is encoded here before one has begun."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[int] = []
        self.pids: list[int] = []
        read, started, take = workers.read_batch, workers._started, workers._Team._take
        noted = self

        def reading(found: Any) -> Any:
            noted.done.append(found.number)
            return read(found)

        def starting(work: str) -> Any:
            worker = started(work)
            noted.pids.append(worker.process.pid)
            return worker

        def taking(self: Any, number: int, batch: Any) -> None:
            while self._workers and not any(worker.ready for worker in self._workers):
                self._receive(block=True)
            take(self, number, batch)

        monkeypatch.setattr(workers, "read_batch", reading)
        monkeypatch.setattr(workers, "_started", starting)
        monkeypatch.setattr(workers._Team, "_take", taking)

    def all_ended(self) -> bool:
        return not any(Path(f"/proc/{pid}").exists() for pid in self.pids)


def dying(row: Row, template: Any, options: EncodeOptions, *, parent: int, at: int) -> Encoded:
    if row.index >= at and os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    return sft_sample(row, template, options)


def refusing(row: Row, template: Any, options: EncodeOptions, *, at: int) -> Encoded:
    if row.index == at:
        raise DataError(f"row {at} is refused")
    return sft_sample(row, template, options)


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Noted:
    return Noted(monkeypatch)


OPTIONS = EncodeOptions(64, "split")


def test_several_processes_make_the_table_of_one(file: Path, noted: Noted) -> None:
    one = content(prepared(file, 1))
    assert not noted.pids
    three = content(prepared(file, 3))
    assert three == one and len(noted.pids) == 2
    assert len(noted.done) >= 10 and noted.all_ended()
    left = [path.name for path in (file.parent / "cache3").rglob("*") if path.is_file()]
    assert sorted(left) == ["report.json", "tokens.arrow"]


def test_few_rows_start_no_process(file: Path, noted: Noted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_ALONE", 600.0)
    assert len(prepared(file, 3).train) > ROWS and not noted.pids


def test_a_process_that_dies_is_named_with_its_rows(file: Path, noted: Noted) -> None:
    encode = partial(dying, options=OPTIONS, parent=os.getpid(), at=40)
    with pytest.raises(DataError, match=r"ended by signal 9 with rows \d+ to \d+.*data.workers"):
        prepared(file, 2, encode)
    assert noted.all_ended() and not list((file.parent / "cache2").iterdir())


def test_the_first_error_is_raised_wherever_it_came_up(file: Path, noted: Noted) -> None:
    with pytest.raises(DataError, match="row 101 is refused"):
        prepared(file, 2, partial(refusing, options=OPTIONS, at=101))
    assert noted.all_ended()
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join([*lines[:200], "{", *lines[200:]]), encoding="utf-8")
    with pytest.raises(DataError, match=r"rows.jsonl, line 201, column 1: not JSON"):
        prepared(file, 2)


def test_work_that_cannot_be_sent_is_done_here(
    file: Path, noted: Noted, caplog: pytest.LogCaptureFixture
) -> None:
    one = content(prepared(file, 1))
    with caplog.at_level(logging.WARNING, "luthier.data"):
        two = content(prepared(file, 2, lambda row, template: sft_sample(row, template, OPTIONS)))
    assert two == one and not noted.pids and "one process tokenizes" in caplog.text


SCRIPT = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
import test_workers
from luthier.data import row_batches, workers
row_batches._ROWS, workers._ALONE = 8, 0.0
plain = workers._Team._take
def patient(self, number, batch):
    while self._workers and not any(worker.ready for worker in self._workers):
        self._receive(block=True)
    plain(self, number, batch)
workers._Team._take = patient
print("script", flush=True)
print(len(test_workers.prepared(Path({file!r}), 2{more}).train), flush=True)
"""


def script(file: Path, more: str = "") -> subprocess.Popen[str]:
    path = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    code = SCRIPT.format(path=path, file=str(file), more=more)
    (file.parent / "unguarded.py").write_text(code, encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, str(file.parent / "unguarded.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_script_without_a_guard_runs_once(file: Path) -> None:
    said, complaint = script(file).communicate(timeout=120)
    assert said.split() == ["script", str(len(prepared(file, 1).train))], complaint


def children(pid: int) -> Iterator[int]:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            yield int(stat.parent.name)


@pytest.mark.slow
@pytest.mark.parametrize("ended", [signal.SIGINT, signal.SIGKILL])
def test_an_interruption_ends_all_processes(file: Path, ended: signal.Signals) -> None:
    process = script(
        file, ", __import__('functools').partial(test_workers.slow, options=test_workers.OPTIONS)"
    )
    until = time.monotonic() + 100
    while not (found := list(children(process.pid))) and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(3)
    process.send_signal(ended)
    process.communicate(timeout=30)
    until = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in found) and time.monotonic() < until:
        time.sleep(0.05)
    assert found and not any(Path(f"/proc/{pid}").exists() for pid in found)
    assert process.returncode in (-ended, 1, 130)


def slow(row: Row, template: Any, options: EncodeOptions) -> Encoded:
    time.sleep(0.1)
    return sft_sample(row, template, options)
