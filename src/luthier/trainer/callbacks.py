"""What a run tells while it trains: `trainer_log.jsonl` for who watches the folder, a bar for the terminal.

Both are ordinary transformers callbacks, write on the main process only and read all numbers from
`TrainerState`; `state.num_input_tokens_seen` is the count of real (not padding) tokens of all processes.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from luthier.files import write_whole
from luthier.trainer.log import LOG_NAME
from luthier.trainer.pace import Pace, clock_text, peak_memory
from luthier.types import CheckpointError

_TOKEN_COUNT = "num_input_tokens_seen"
"""transformers' name for what a line has as `tokens`."""


# --------------------------------------------------------------------------------------------------
# The log file


class LogCallback(TrainerCallback):
    """Writes one JSON object a line to `<output>/trainer_log.jsonl`, on the main process.

    Every line has `current_steps`, `elapsed_time` (H:MM:SS of this process) and `memory` (bytes, see
    `peak_memory`); in training also `total_steps`, `percentage`, `epoch` and, once a step is done,
    `remaining_time`; `tokens` counts the real tokens trained on so far and `tokens_per_second` is their
    rate since the last training line, evaluation and saving aside. A process that went on from a checkpoint says
    at which step in `resumed_from`. All metrics keep their own names (`loss`,
    `learning_rate`, `grad_norm`, `eval_loss`, `eval_<set>_loss`, ...). A number that is not finite is
    written as "NaN", "Infinity" or "-Infinity".

    A run that begins at step 0 begins a new file. One resumed at step k keeps the lines up to step k, drops
    what the killed run wrote after it, and appends. Raises CheckpointError where a line to keep is damaged.
    """

    def __init__(self, output: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = Path(output) / LOG_NAME
        self._pace = Pace(clock)
        self._ready = False
        self._resumed_from = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._pace.begin(state)
        self._prepare(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._pace.step_end()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._pace.pause_end()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._pace.pause_end()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if not self._ready:  # an evaluation without training: nothing was begun
            self._prepare(state)
        line = json.dumps(self._line(state, logs), ensure_ascii=False, allow_nan=False)
        # Opened anew for every line, so that each is with the system before training goes on.
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def _line(self, state: TrainerState, logs: Mapping[str, Any]) -> dict[str, Any]:
        in_training = state.max_steps > 0
        line: dict[str, Any] = {"current_steps": state.global_step}
        if in_training:
            line["total_steps"] = state.max_steps
        if self._resumed_from:
            line["resumed_from"] = self._resumed_from
        line |= {name: _plain(value) for name, value in logs.items() if name != _TOKEN_COUNT}
        if in_training:
            line["percentage"] = round(100 * state.global_step / state.max_steps, 2)
        line["elapsed_time"] = clock_text(self._pace.elapsed())
        remaining = self._pace.remaining(state)
        if in_training and remaining is not None:
            line["remaining_time"] = clock_text(remaining)
        if state.num_input_tokens_seen:
            line["tokens"] = state.num_input_tokens_seen
        rate = self._pace.tokens_per_second(state) if "loss" in logs else None
        if rate is not None:
            line["tokens_per_second"] = round(rate, 2)
        line["memory"] = peak_memory()
        return line

    def _prepare(self, state: TrainerState) -> None:
        self._ready = True
        self._resumed_from = state.global_step
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = kept_lines(self.path, state.global_step) if state.global_step and self.path.exists() else []
        write_whole(self.path, "".join(line + "\n" for line in kept))


def _plain(value: Any) -> Any:
    """A JSON value. JSON has no NaN or infinity: they become the words that `float()` reads back."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, Real) and not isinstance(value, bool | int):
        value = float(value)
        if not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def kept_lines(path: Path, step: int) -> list[str]:
    """The lines of a log that were written at `step` or before.

    A last line without its line end is what a killed writer left, and is dropped. Raises CheckpointError
    where another line is no JSON object with `current_steps`.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            written_at = json.loads(line)["current_steps"]
            if written_at <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path}, line {number} is not a log line (a JSON object with a number `current_steps`); "
                f"remove it to resume this run"
            ) from error
    return kept


# --------------------------------------------------------------------------------------------------
# The terminal


_SHORT = {
    "loss": "loss",
    "learning_rate": "lr",
    "grad_norm": "grad",
    "accuracy": "accuracy",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
}
"""What a line of training shows, and what it is called there."""


class ProgressCallback(TrainerCallback):
    """Shows training and evaluation: bars on a terminal, else one plain line for each log event.

    `quiet` shows nothing. Used as a context manager around training, it gives the terminal back
    whatever happens in between.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        file: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._quiet = quiet
        self._file = file
        self._pace = Pace(clock)
        self._progress: Progress | None = None
        self._train: TaskID | None = None
        self._evaluation: TaskID | None = None
        self._answers: TaskID | None = None
        self._loader: Any = None
        self._text = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop drawing and give the terminal back; further events draw anew."""
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._train = self._evaluation = self._answers = self._loader = None

    def answered(self, done: int, total: int) -> None:
        """Show on a terminal that answers are sampled, `done` of `total`; with the last one the bar goes."""
        if self._quiet or not self._draws:
            return
        bars = self._bars()
        if self._answers is None:
            self._answers = bars.add_task("answers", total=total, text="")
        bars.update(self._answers, completed=done, total=total)
        if done == total:
            bars.remove_task(self._answers)
            self._answers = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._pace.begin(state)
        self._text = ""
        if self._shows(state) and self._draws:
            self._train = self._bars().add_task(
                "train", total=state.max_steps, completed=state.global_step, text=""
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._pace.step_end()
        if self._progress is not None and self._train is not None:
            self._progress.update(
                self._train, completed=state.global_step, text=_joined(self._text, self._rest(state))
            )

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if not self._shows(state) or not self._draws:
            return
        bars = self._bars()
        total = len(eval_dataloader) if hasattr(eval_dataloader, "__len__") else None
        # An evaluation set after another begins its own bar: its loader is another object.
        if self._evaluation is None:
            self._evaluation = bars.add_task("evaluate", total=total, text="")
        elif self._loader is not eval_dataloader:
            bars.reset(self._evaluation, total=total)
        self._loader = eval_dataloader
        bars.advance(self._evaluation)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._pace.pause_end()
        self._end_evaluation()

    def on_predict(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Any,
        **kwargs: Any,
    ) -> None:
        self._pace.pause_end()
        self._end_evaluation()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._pace.pause_end()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not self._shows(state) or not logs:
            return
        text = self._numbers(state, logs)
        if "loss" in logs:
            self._text = text
        if not self._draws:
            print(
                _joined(self._place(state), text, self._rest(state)),
                file=self._file or sys.stdout,
                flush=True,
            )
        elif "loss" in logs and self._progress is not None and self._train is not None:
            self._progress.update(self._train, text=_joined(text, self._rest(state)))
        else:  # results stay on the screen; the bar goes on below them
            console = self._progress.console if self._progress is not None else Console(file=self._file)
            console.print(_joined(self._place(state), text), markup=False, highlight=False, soft_wrap=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def _shows(self, state: TrainerState) -> bool:
        return state.is_world_process_zero and not self._quiet

    @cached_property
    def _draws(self) -> bool:
        """Whether there is a terminal that understands control codes (asked once: a bar replaces stdout)."""
        file = self._file or sys.stdout
        return file.isatty() and not Console(file=file).is_dumb_terminal

    def _bars(self) -> Progress:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                console=Console(file=self._file),
            )
            self._progress.start()
        return self._progress

    def _end_evaluation(self) -> None:
        if self._progress is not None and self._evaluation is not None:
            self._progress.remove_task(self._evaluation)
            self._evaluation = self._loader = None
            if self._train is None:
                self.close()

    def _place(self, state: TrainerState) -> str:
        return f"step {state.global_step}/{state.max_steps}" if state.max_steps > 0 else ""

    def _numbers(self, state: TrainerState, logs: Mapping[str, Any]) -> str:
        short = _SHORT if "loss" in logs else None
        parts = []
        for name, value in logs.items():
            label = name if short is None else short.get(name)
            if label is None or name in ("epoch", "total_flos", _TOKEN_COUNT) or not isinstance(value, Real):
                continue
            parts.append(f"{label} {float(value):.4g}")
        rate = self._pace.tokens_per_second(state) if "loss" in logs else None
        if rate is not None:
            parts.append(f"{rate:,.0f} tokens/s")
        return " | ".join(parts)

    def _rest(self, state: TrainerState) -> str:
        remaining = self._pace.remaining(state)
        left = f"{clock_text(remaining)} left" if remaining is not None and state.max_steps > 0 else ""
        return _joined(left, f"{peak_memory() / 2**30:.2f} GiB")


def _joined(*parts: str) -> str:
    return " | ".join(part for part in parts if part)
