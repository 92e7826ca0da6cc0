"""The run's log and its progress display, driven by a real transformers Trainer under a fake clock."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from luthier.trainer import callbacks
from luthier.trainer.callbacks import LogCallback, ProgressCallback
from luthier.trainer.pace import clock_text
from luthier.types import CheckpointError

TOKENS = 16
"""Tokens of one step: two rows of eight."""


class Clock:
    def __init__(self) -> None:
        self.now = 5000.0

    def __call__(self) -> float:
        return self.now


class ClockedTrainer(Trainer):
    """A step takes 10 s, an evaluation batch 100 s, a checkpoint 1000 s; it dies in step `killed_in`."""

    def __init__(self, clock: Clock, killed_in: int | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.clock, self.killed_in = clock, killed_in

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.killed_in == self.state.global_step + 1:
            raise InterruptedError
        self.clock.now += 10
        self.state.num_input_tokens_seen += TOKENS
        return super().training_step(*args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        self.clock.now += 100
        return super().prediction_step(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.clock.now += 1000
        super()._save_checkpoint(*args, **kwargs)


def rows(count: int) -> list[dict[str, list[int]]]:
    generator = np.random.default_rng(0)
    ids = [generator.integers(0, 32, 8).tolist() for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(
    output: Path, callback: TrainerCallback, clock: Clock, *, killed_in: int | None = None, **changes: Any
) -> ClockedTrainer:
    """Ten steps; a line every 2, an evaluation of two batches and a checkpoint every 4 and at the end."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_strategy": "steps",
        "save_steps": 4,
    } | changes
    built = ClockedTrainer(
        clock,
        killed_in,
        model=LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)),
        args=TrainingArguments(
            output_dir=str(output),
            num_train_epochs=1,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
            logging_steps=2,
            disable_tqdm=True,
            report_to=[],
            use_cpu=True,
            **settings,
        ),
        train_dataset=rows(20),
        eval_dataset=rows(4),
        callbacks=[callback],
    )
    built.remove_callback(PrinterCallback)
    return built


def read(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "trainer_log.jsonl").read_text().splitlines()]


def column(lines: list[dict[str, Any]], *keys: str) -> list[tuple[Any, ...]]:
    return [tuple(line.get(key) for key in keys) for line in lines]


# --------------------------------------------------------------------------------------------------
# The log file


def test_every_line_of_a_run(tmp_path: Path) -> None:
    clock = Clock()
    run = trainer(tmp_path, LogCallback(tmp_path, clock=clock), clock)
    clock.now += 77  # between building and training: no part of any time
    run.train()
    lines = read(tmp_path)
    kinds = ["loss", "loss", "eval_loss", "loss", "loss", "eval_loss", "loss", "eval_loss", "train_loss"]
    assert [
        next(kind for kind in ("loss", "eval_loss", "train_loss") if kind in line) for line in lines
    ] == kinds
    keys = ("current_steps", "total_steps", "percentage", "epoch", "elapsed_time", "remaining_time", "tokens")
    assert column(lines, *keys) == [
        (2, 10, 20.0, 0.2, "0:00:20", "0:01:20", 32),
        (4, 10, 40.0, 0.4, "0:00:40", "0:01:00", 64),
        (4, 10, 40.0, 0.4, "0:04:00", "0:06:00", 64),
        (6, 10, 60.0, 0.6, "0:21:00", "0:14:00", 96),
        (8, 10, 80.0, 0.8, "0:21:20", "0:05:20", 128),
        (8, 10, 80.0, 0.8, "0:24:40", "0:06:10", 128),
        (10, 10, 100.0, 1.0, "0:41:40", "0:00:00", 160),
        (10, 10, 100.0, 1.0, "0:45:00", "0:00:00", 160),
        (10, 10, 100.0, 1.0, "1:01:40", "0:00:00", 160),
    ]
    # 16 tokens in 10 seconds, whatever evaluations and checkpoints took
    assert [line.get("tokens_per_second") for line in lines] == [
        *(1.6, 1.6, None, 1.6, 1.6, None, 1.6, None, None)
    ]
    history = [{k: v for k, v in entry.items() if k != "step"} for entry in run.state.log_history]
    for line, entry in zip(lines, history, strict=True):
        assert {key: line[key] for key in entry} == entry
    assert {"loss", "grad_norm", "learning_rate"} <= lines[0].keys()
    assert "learning_rate" not in lines[2]
    assert all(line["memory"] > 50 * 2**20 for line in lines)


def test_resume_keeps_the_lines_up_to_the_checkpoint_and_counts_only_its_own_steps(tmp_path: Path) -> None:
    clock = Clock()
    with pytest.raises(InterruptedError):
        trainer(tmp_path, LogCallback(tmp_path, clock=clock), clock, killed_in=8).train()
    path = tmp_path / "trainer_log.jsonl"
    before = path.read_text().splitlines()
    assert [json.loads(line)["current_steps"] for line in before] == [2, 4, 4, 6]
    with path.open("a") as stream:
        stream.write('{"current_steps": 8, "lo')  # the last write of the killed process

    clock = Clock()
    run = trainer(tmp_path, LogCallback(tmp_path, clock=clock), clock)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert path.read_text().splitlines()[:3] == before[:3]
    assert column(read(tmp_path), "resumed_from") == [(None,)] * 3 + [(4,)] * 6
    keys = ("current_steps", "elapsed_time", "remaining_time", "tokens", "tokens_per_second")
    assert column(read(tmp_path)[3:], *keys) == [
        (6, "0:00:20", "0:00:40", 96, 1.6),
        (8, "0:00:40", "0:00:20", 128, 1.6),
        (8, "0:04:00", "0:02:00", 128, None),
        (10, "0:21:00", "0:00:00", 160, 1.6),
        (10, "0:24:20", "0:00:00", 160, None),
        (10, "0:41:00", "0:00:00", 160, None),
    ]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_new_run_begins_a_new_file(tmp_path: Path) -> None:
    (tmp_path / "trainer_log.jsonl").write_text('{"current_steps": 1, "loss": 9.0}\n')
    clock = Clock()
    trainer(tmp_path, LogCallback(tmp_path, clock=clock), clock, max_steps=2, eval_strategy="no").train()
    assert [line["current_steps"] for line in read(tmp_path)] == [2, 2]


def test_resume_into_a_new_folder_begins_a_new_file(tmp_path: Path) -> None:
    clock = Clock()
    trainer(tmp_path / "a", LogCallback(tmp_path / "a", clock=clock), clock, max_steps=4).train()
    run = trainer(tmp_path / "b", LogCallback(tmp_path / "b", clock=clock), clock, eval_strategy="no")
    run.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert [line["current_steps"] for line in read(tmp_path / "b")] == [6, 8, 10, 10]


def test_a_damaged_line_stops_the_resume_and_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trainer_log.jsonl"
    for broken in ("{]", "[3]", '{"loss": 1.0}', '{"current_steps": "3"}'):
        content = f'{{"current_steps": 2}}\n{broken}\n{{"current_steps": 4}}\n'
        path.write_text(content)
        state = TrainerState(global_step=4, max_steps=10)
        with pytest.raises(CheckpointError, match=r"trainer_log\.jsonl, line 2 is not a log line"):
            LogCallback(tmp_path).on_train_begin(None, state, None)  # type: ignore[arg-type]
        assert path.read_text() == content


def test_evaluation_alone_has_no_steps_to_count(tmp_path: Path) -> None:
    clock = Clock()
    run = trainer(tmp_path, LogCallback(tmp_path, clock=clock), clock)
    run.evaluate({"alpaca": rows(2), "identity": rows(4)})
    alpaca, identity = read(tmp_path)
    assert alpaca["eval_alpaca_loss"] == run.state.log_history[0]["eval_alpaca_loss"]
    assert identity["eval_identity_loss"] == run.state.log_history[1]["eval_identity_loss"]
    assert (alpaca["elapsed_time"], identity["elapsed_time"]) == ("0:01:40", "0:05:00")
    assert alpaca["current_steps"] == 0
    assert not {"total_steps", "percentage", "remaining_time", "tokens", "loss"} & alpaca.keys()


def log(callback: TrainerCallback, state: TrainerState, logs: dict[str, Any]) -> None:
    callback.on_log(None, state, TrainerControl(), logs=logs)  # type: ignore[arg-type]


def test_numbers_of_every_kind_become_strict_json(tmp_path: Path) -> None:
    state = TrainerState(global_step=1, max_steps=0)
    values = {
        "loss": float("nan"),
        "grad_norm": torch.tensor(float("inf")),
        "a": np.float32(0.5),
        "b": torch.tensor(3),
        "c": -np.inf,
        "reward": 2,
        "note": "é",
    }
    log(LogCallback(tmp_path), state, values)
    text = (tmp_path / "trainer_log.jsonl").read_text(encoding="utf-8")
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert {key: line[key] for key in values} == {
        "loss": "NaN",
        "grad_norm": "Infinity",
        "a": 0.5,
        "b": 3,
        "c": "-Infinity",
        "reward": 2,
        "note": "é",
    }


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    state = TrainerState(global_step=0, max_steps=4, is_world_process_zero=False)
    callback = LogCallback(tmp_path)
    callback.on_train_begin(None, state, None)  # type: ignore[arg-type]
    log(callback, state, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_each_line_is_in_the_file_at_once(tmp_path: Path) -> None:
    callback, state = LogCallback(tmp_path), TrainerState(global_step=1, max_steps=4)
    for count in (1, 2, 3):
        log(callback, state, {"loss": 1.0})
        assert len(read(tmp_path)) == count


PEAK = """
import numpy as np, psutil
from luthier.trainer.pace import peak_memory

before, process = peak_memory(), psutil.Process()
block = np.ones(max(before - process.memory_info().rss + 64 * 2**20, 1) // 8)
peak = peak_memory()
assert before + 32 * 2**20 < peak < before + 128 * 2**20, (before, peak)
del block
assert process.memory_info().rss < peak
assert abs(peak_memory() - peak) < 4 * 2**20  # the kernel counts pages per CPU and adds them up late
"""


def test_peak_memory_is_a_peak_in_bytes() -> None:
    """In a process of its own: in a large one the kernel takes back pages of files while the block is made."""
    subprocess.run([sys.executable, "-c", PEAK], check=True)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3661, "1:01:01"), (360_000, "100:00:00")]
)
def test_clock_text(seconds: float, text: str) -> None:
    assert clock_text(seconds) == text


# --------------------------------------------------------------------------------------------------
# The terminal


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "peak_memory", lambda: 3 * 2**29)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")


@pytest.mark.usefixtures("memory")
def test_without_a_terminal_each_event_is_one_plain_line(tmp_path: Path) -> None:
    clock, out = Clock(), io.StringIO()
    run = trainer(tmp_path, ProgressCallback(file=out, clock=clock), clock)
    run.train()
    lines = out.getvalue().splitlines()
    assert "\x1b" not in out.getvalue()
    assert "\r" not in out.getvalue()
    assert len(lines) == len(run.state.log_history) == 9
    first, evaluation = run.state.log_history[0], run.state.log_history[2]
    numbers = f"loss {first['loss']:.4g} | grad {first['grad_norm']:.4g} | lr {first['learning_rate']:.4g}"
    assert lines[0] == f"step 2/10 | {numbers} | 2 tokens/s | 0:01:20 left | 1.50 GiB"
    assert lines[2].startswith(f"step 4/10 | eval_loss {evaluation['eval_loss']:.4g} | ")
    assert lines[2].endswith(" | 0:06:00 left | 1.50 GiB")


@pytest.mark.usefixtures("memory")
def test_on_a_terminal_bars_are_drawn_and_the_cursor_given_back(tmp_path: Path) -> None:
    clock, out = Clock(), Terminal()
    run = trainer(tmp_path, ProgressCallback(file=out, clock=clock), clock)
    run.train()
    text = out.getvalue()
    assert "10/10" in text
    assert "2 tokens/s | 0:00:00 left | 1.50 GiB" in text
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert f"step 4/10 | eval_loss {run.state.log_history[2]['eval_loss']:.4g}" in plain
    assert re.search(r"evaluate .* [012]/2", plain)
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1


@pytest.mark.usefixtures("memory")
def test_an_interrupted_run_gives_the_terminal_back(tmp_path: Path) -> None:
    clock, out = Clock(), Terminal()
    with pytest.raises(InterruptedError), ProgressCallback(file=out, clock=clock) as progress:
        trainer(tmp_path, progress, clock, killed_in=3).train()
    assert out.getvalue().count("\x1b[?25l") == out.getvalue().count("\x1b[?25h") == 1


@pytest.mark.usefixtures("memory")
def test_evaluation_alone_draws_and_closes_its_bar(tmp_path: Path) -> None:
    clock, out = Clock(), Terminal()
    run = trainer(tmp_path, ProgressCallback(file=out, clock=clock), clock)
    loss = run.evaluate()["eval_loss"]
    assert f"eval_loss {loss:.4g}" in out.getvalue()
    assert out.getvalue().count("\x1b[?25l") == out.getvalue().count("\x1b[?25h") == 1


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("file", [Terminal, io.StringIO])
def test_quiet_shows_nothing(
    tmp_path: Path, file: type[io.StringIO], capsys: pytest.CaptureFixture[str]
) -> None:
    clock, out = Clock(), file()
    trainer(tmp_path, ProgressCallback(quiet=True, file=out, clock=clock), clock).train()
    assert out.getvalue() == ""
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("memory")
def test_other_processes_and_dumb_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Terminal()
    other = TrainerState(global_step=1, max_steps=4, is_world_process_zero=False)
    log(ProgressCallback(file=out), other, {"loss": 1.0})
    assert out.getvalue() == ""
    monkeypatch.setenv("TERM", "dumb")
    log(ProgressCallback(file=out), TrainerState(max_steps=4), {"loss": 1.0})
    assert out.getvalue() == "step 0/4 | loss 1 | 1.50 GiB\n"


@pytest.mark.usefixtures("memory")
def test_each_evaluation_set_has_a_bar_of_its_own_length() -> None:
    out, state = Terminal(), TrainerState(max_steps=0)
    callback = ProgressCallback(file=out)
    for loader in ([0] * 3, [0] * 2):
        for done in range(1, len(loader) + 1):
            callback.on_prediction_step(None, state, None, eval_dataloader=loader)  # type: ignore[arg-type]
            assert callback._progress is not None
            (task,) = callback._progress.tasks
            assert (task.completed, task.total) == (done, len(loader))
    callback.on_evaluate(None, state, None, metrics={})  # type: ignore[arg-type]
    assert out.getvalue().count("\x1b[?25l") == out.getvalue().count("\x1b[?25h") == 1
