"""What every contender's process measures, in one way for all: step times, losses, tokens and memory.

`install()` adds one callback to transformers' list of default callbacks, so the same clock runs in every
trainer that is built on `transformers.Trainer`, whoever builds it. Memory is the kernel's resident set
size: the high-water mark is reset when training begins, so loading the model does not count as training.
The machine's rate of matrix products is measured right after the training, in the same process, if the job
names products.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import gemm_rate
from transformers import TrainerCallback, trainer as transformers_trainer

KIB_IN_MIB = 1024


def load_job() -> dict[str, Any]:
    """Read the job file named on the command line and limit torch to the job's threads."""
    import torch

    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    return job


def memory(field: str) -> float:
    """`VmRSS` (now) or `VmHWM` (high-water mark) of this process in MiB, from the Linux kernel."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / KIB_IN_MIB
    raise KeyError(f"{field} is not in /proc/self/status")


class Record:
    """Filled by the clock while the contender trains. Seconds of the wall, and of the processor (`cpu`)."""

    def __init__(self) -> None:
        self.step_ends: list[float] = []
        self.cpu_ends: list[float] = []
        self.losses: list[float] = []
        self.counted_tokens: list[int] = []
        self.answer_logprobs: list[tuple[float, float]] = []
        self.seconds_of: dict[str, float] = {}
        self.calls_of: dict[str, list[float]] = {}
        self.initial_weights = ""
        self.began = 0.0
        self.cpu_began = 0.0
        self.rss_before_mib = 0.0
        self.peak_before_mib = 0.0
        self.peak_training_mib = 0.0


RECORD = Record()


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Notes the end of each optimizer step and what is logged for it."""

    def on_train_begin(self, _args: Any, _state: Any, _control: Any, model: Any = None, **__: Any) -> None:
        RECORD.initial_weights = trained_weights(model)
        RECORD.rss_before_mib = memory("VmRSS")
        RECORD.peak_before_mib = memory("VmHWM")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM to VmRSS
        RECORD.cpu_began = time.process_time()
        RECORD.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        RECORD.step_ends.append(time.perf_counter())
        RECORD.cpu_ends.append(time.process_time())
        RECORD.peak_training_mib = memory("VmHWM")

    def on_log(
        self, _args: Any, _state: Any, _control: Any, logs: dict[str, Any] | None = None, **__: Any
    ) -> None:
        if logs and "loss" in logs:
            RECORD.losses.append(float(logs["loss"]))
            if "num_tokens" in logs:
                RECORD.counted_tokens.append(int(logs["num_tokens"]))
            if "logps/chosen" in logs:
                RECORD.answer_logprobs.append((float(logs["logps/chosen"]), float(logs["logps/rejected"])))


def install() -> None:
    """Let every trainer built from now on in this process carry the clock."""
    transformers_trainer.DEFAULT_CALLBACKS.append(StepClock)


def trained_weights(model: Any) -> str:
    """SHA-256 of everything that trains, in the order of the names: the same for the same start."""
    digest = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            digest.update(parameter.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def time_calls(owner: type, method: str, name: str) -> None:
    """Add the seconds of every call of `owner.method` up under `name`, and keep each in `RECORD.calls_of`."""
    original = getattr(owner, method)

    @functools.wraps(original)
    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            spent = time.perf_counter() - began
            RECORD.seconds_of[name] = RECORD.seconds_of.get(name, 0.0) + spent
            RECORD.calls_of.setdefault(name, []).append(spent)

    setattr(owner, method, timed)


def tokens_of_steps(job: dict[str, Any]) -> list[int]:
    """Real tokens of each step of a contender that takes the rows in order, `rows_per_step` at a time."""
    size = job["rows_per_step"]
    lengths = [len(row["input_ids"]) for row in job["rows"]]
    return [sum(lengths[start : start + size]) for start in range(0, size * job["steps"], size)]


def answer_tokens_of_steps(job: dict[str, Any]) -> list[int]:
    """Tokens of the two answers of each step of a contender that takes the pairs in order."""
    size = job["rows_per_step"]
    lengths = [len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in job["pairs"]]
    return [sum(lengths[start : start + size]) for start in range(0, size * job["steps"], size)]


def report(job: dict[str, Any], contender: str, tokens: list[int], **extra: Any) -> None:
    """Print the one JSON line. `tokens`: real tokens of each step; the first `warmup` steps are not timed."""
    warmup, ends = job["warmup"], RECORD.step_ends
    if len(ends) != len(tokens) or len(ends) <= warmup:
        raise RuntimeError(
            f"{contender}: {len(ends)} steps were timed, {len(tokens)} expected, {warmup} of them warm-up"
        )
    start, cpu_start = (
        (ends[warmup - 1], RECORD.cpu_ends[warmup - 1]) if warmup else (RECORD.began, RECORD.cpu_began)
    )
    line = {
        "contender": contender,
        "tokens": sum(tokens[warmup:]),
        "seconds": ends[-1] - start,
        "cpu_seconds": RECORD.cpu_ends[-1] - cpu_start,
        "timed_steps": len(ends) - warmup,
        "tokens_of_steps": tokens,
        "losses": RECORD.losses,
        "answer_logprobs": RECORD.answer_logprobs,
        "initial_weights": RECORD.initial_weights,
        "seconds_of": RECORD.seconds_of,
        "rss_before_mib": RECORD.rss_before_mib,
        "peak_before_mib": RECORD.peak_before_mib,
        "peak_training_mib": RECORD.peak_training_mib,
        **extra,
    }
    if "products" in job:
        line["flops_per_second"] = gemm_rate.flops_per_second(job["products"])
    print("\n" + json.dumps(line), flush=True)
