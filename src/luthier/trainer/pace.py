"""How fast a process trains and how much memory it took."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import TrainerState


class Pace:
    """How fast this process trains. Steps and tokens from before a resume are no part of any rate.

    `clock` gives seconds. Time spent evaluating and saving counts for `elapsed` and `remaining`,
    but not for tokens per second.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._started = self._mark = clock()
        self._first_step = 0
        self._training = 0.0
        self._tokens = 0

    def begin(self, state: TrainerState) -> None:
        self._started = self._mark = self._clock()
        self._first_step, self._tokens, self._training = state.global_step, state.num_input_tokens_seen, 0.0

    def step_end(self) -> None:
        """A training step is over: the time since the last mark was training."""
        now = self._clock()
        self._training += now - self._mark
        self._mark = now

    def pause_end(self) -> None:
        """Something other than training is over: the time since the last mark is nobody's."""
        self._mark = self._clock()

    def elapsed(self) -> float:
        """Seconds since this process began to train."""
        return self._clock() - self._started

    def remaining(self, state: TrainerState) -> float | None:
        """Seconds to the last step at the rate so far; None before the first step of this process."""
        done, left = state.global_step - self._first_step, state.max_steps - state.global_step
        return None if done <= 0 else self.elapsed() / done * max(left, 0)

    def tokens_per_second(self, state: TrainerState) -> float | None:
        """Real tokens of all processes per second of training since the last call; None without any."""
        tokens = state.num_input_tokens_seen - self._tokens
        if tokens <= 0 or self._training <= 0:
            return None
        rate = tokens / self._training
        self._tokens, self._training = state.num_input_tokens_seen, 0.0
        return rate


def peak_memory() -> int:
    """Bytes: the most that this process has allocated on its CUDA device, or else its peak resident set."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would give a parent's peak, inherited through exec
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def clock_text(seconds: float) -> str:
    """Seconds as H:MM:SS; hours go on past a day. The nearest second."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
