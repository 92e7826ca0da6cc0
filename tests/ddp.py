"""Runs that are made in one process and in several: recipes of all stages on a tiny model, and what several
processes meet on their way (`processes.Change`)."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tests.compared import recipe_for
from tests.tiny import write_alpaca

FULL: dict[str, Any] = {"type": "full"}
LORA: dict[str, Any] = {"type": "lora", "rank": 4}
STAGES: dict[str, dict[str, Any]] = {
    "pt": {"type": "pt"},
    "sft": {"type": "sft"},
    "dpo": {"type": "dpo", "beta": 0.5},
    "bco": {"type": "dpo", "loss": "bco_pair", "beta": 0.5},
    "kto": {"type": "kto", "desirable_weight": 2.0},
    "rm": {"type": "rm", "center": 0.01, "margin": 0.2},
}
"""bco and kto compare each row with statistics of the whole step."""
ROWS = 21
"""Steps of four rows leave a last one of one row, in which a process has nothing to do."""


def recipe(
    folder: Path, base: Path, stage: str, method: dict[str, Any], /, **sections: Any
) -> dict[str, Any]:
    """Two epochs of ROWS rows, four in a step, evaluated on two sets; without Adam, which makes whole steps of what is
    rounding alone."""
    folder.mkdir(parents=True, exist_ok=True)
    if stage in ("pt", "sft"):
        found = _supervised(folder, base, stage)
    else:
        name = "kto" if stage == "kto" else "dpo"
        found = recipe_for(name, folder, base, rows=(ROWS, 7))
        found["stage"] = STAGES[stage]
        del found["train"]["max_steps"]
    found |= {"method": method, "optim": {"type": "sgd", "lr": 0.05 if method["type"] == "full" else 0.5}}
    found["train"] |= {"rows_per_device": 1, "accumulation": 4, "epochs": 2, "log_every": 1, "eval_every": 4}
    found["train"] |= {"save_every": None, "plots": False, "output": str(folder / "one")}
    for section, values in sections.items():
        found[section] = {**found.get(section, {}), **values}
    return found


def _supervised(folder: Path, base: Path, stage: str) -> dict[str, Any]:
    for name, count in (("a", 11), ("b", ROWS - 11)):
        write_alpaca(folder / f"{name}.json", count)
        if stage == "pt":
            rows = json.loads((folder / f"{name}.json").read_text())
            (folder / f"{name}.json").write_text(json.dumps([{"text": row["output"]} for row in rows]))
    columns = {"columns": {"prompt": "text"}} if stage == "pt" else {}
    sets = [{"file_name": f"{name}.json", **columns} for name in "ab"]
    return {
        "model": {"path": str(base)},
        "data": {"train": sets, "eval": sets, "directory": str(folder), "cache": str(folder / "cache")},
        "stage": STAGES[stage],
        "train": {"metrics": ["accuracy"]},
    }


def shared_out(one: dict[str, Any], output: Path, count: int, /, **train: Any) -> dict[str, Any]:
    """The recipe for so many processes: the same rows in a step."""
    found = copy.deepcopy(one)
    if "accumulation" in found["train"]:
        found["train"]["accumulation"] //= count
    found["train"] |= {"output": str(output), **train}
    return found


# --------------------------------------------------------------------------------------------------
# What is watched, and what goes wrong


@contextmanager
def seen(rank: int) -> Iterator[None]:
    """Each process writes which rows it trains on at which step, as `seen-<rank>.jsonl` beside the run."""
    from luthier.trainer.trainer import PeftTrainer

    run = PeftTrainer._run_passes

    def noted(self: PeftTrainer, model: Any, passes: Sequence[Any]) -> Any:
        rows = sorted({row for batch in passes for row in batch.samples})
        with Path(str(self.args.output_dir), f"seen-{rank}.jsonl").open("a") as stream:
            stream.write(json.dumps([self.state.global_step, rows]) + "\n")
        return run(self, model, passes)

    with patch.object(PeftTrainer, "_run_passes", noted):
        yield


def nan_on_second(rank: int) -> AbstractContextManager[Any]:
    """The second process's part of the third step is not a number, once."""
    from luthier.trainer.trainer import PeftTrainer

    if rank != 1:
        return nullcontext()
    run, done = PeftTrainer._run_passes, []

    def broken(self: PeftTrainer, model: Any, passes: Sequence[Any]) -> Any:
        loss, metrics = run(self, model, passes)
        if self.state.global_step == 2 and not done:
            done.append(True)
            return loss * float("nan"), metrics
        return loss, metrics

    return patch.object(PeftTrainer, "_run_passes", broken)


def local_statistics(rank: int) -> AbstractContextManager[Any]:
    """What a step's rows are compared with is of this process's rows."""
    from luthier.trainer import trainer

    observe = trainer.observe  # type: ignore[attr-defined]
    return patch.object(trainer, "observe", lambda *given: observe(*given[:-1]))


def local_metrics(rank: int) -> AbstractContextManager[Any]:
    """Sums of evaluations are of this process's rows."""
    from luthier.trainer.processes import Processes

    return patch.object(Processes, "sums", lambda self, numbers: dict(numbers))


def unreadable_on_second(rank: int) -> AbstractContextManager[Any]:
    """The second process cannot read the checkpoint."""
    from luthier.methods.lora import Lora
    from luthier.types import CheckpointError

    def broken(self: Lora, model: Any, folder: Path) -> None:
        raise CheckpointError("adapter_model.safetensors: input/output error")

    return patch.object(Lora, "load", broken) if rank == 1 else nullcontext()


def crash_on_second(rank: int) -> AbstractContextManager[Any]:
    """The second process fails at its data, and not with an error of ours."""
    from luthier import run

    def broken(*given: Any) -> None:
        raise OSError(5, "Input/output error")

    return patch.object(run, "read_material", broken) if rank == 1 else nullcontext()


def full_disk_on_first(rank: int) -> AbstractContextManager[Any]:
    """There is no room for the finished model, which the first process alone writes."""
    from luthier import run
    from luthier.types import CheckpointError

    def broken(*given: Any) -> None:
        raise CheckpointError("no room")

    return patch.object(run, "published_files", broken) if rank == 0 else nullcontext()


class StopAfterTwo(TrainerCallback):
    """Stops as a callback does that looks at the clock of one machine."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 2 and args.process_index == 1:
            control.should_training_stop = True


def signal_after_second(rank: int) -> AbstractContextManager[Any]:
    """A signal reaches the second process alone, in its second step."""
    import os
    import signal

    from luthier.trainer.trainer import PeftTrainer

    run = PeftTrainer._run_passes

    def interrupted(self: PeftTrainer, model: Any, passes: Sequence[Any]) -> Any:
        if rank == 1 and self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return run(self, model, passes)

    return patch.object(PeftTrainer, "_run_passes", interrupted)


def draws(rank: int) -> AbstractContextManager[Any]:
    """Each process writes the first number that it would draw in each step, as `draws-<rank>.jsonl`."""
    from luthier.trainer.trainer import PeftTrainer

    run = PeftTrainer._run_passes

    def noted(self: PeftTrainer, model: Any, passes: Sequence[Any]) -> Any:
        with torch.random.fork_rng():
            number = float(torch.rand(()))
        with Path(str(self.args.output_dir), f"draws-{rank}.jsonl").open("a") as stream:
            stream.write(json.dumps(number) + "\n")
        return run(self, model, passes)

    return patch.object(PeftTrainer, "_run_passes", noted)
