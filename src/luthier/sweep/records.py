"""What a sweep writes down: one line for each finished trial, what it was made from, and who is at work.

sweep.json     what decides the trials; a folder belongs to one sweep
trials.jsonl   a line for each finished trial, in order
best.yaml      the complete recipe of the best so far
running.json   the processes at work here; absent when there are none
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from luthier.files import write_whole
from luthier.recipe.load import DEFAULT, LoadedRecipe, dump_recipe, leaves
from luthier.recipe.source import dotted
from luthier.recipe.sweep import Sweep
from luthier.sweep.space import Params
from luthier.types import CheckpointError

SWEEP_NAME, TRIALS_NAME, BEST_NAME, RUNNING_NAME = "sweep.json", "trials.jsonl", "best.yaml", "running.json"

Status = Literal["done", "failed", "pruned"]


@dataclass(frozen=True, slots=True)
class Trial:
    """A finished trial; a line of `trials.jsonl`."""

    trial: int
    """From 1."""
    params: Params
    status: Status
    metric: str
    value: float | None
    """Of the metric: at the end, or where the trial was stopped; None where it failed."""
    seconds: float
    """Wall time of its last process."""
    error: str | None = None
    """The last line that it said."""
    same_as: int | None = None
    """The earlier trial with the same values, whose result this is."""
    reports: tuple[tuple[int, float], ...] = ()
    """(step, value) that a pruner has seen."""


def trial_name(number: int) -> str:
    return f"trial-{number:03d}"


# --------------------------------------------------------------------------------------------------
# The folder


def open_folder(sweep: Sweep) -> list[Trial]:
    """Make the folder of a new sweep, or read what an earlier start has finished; writes `sweep.json`.

    Raises CheckpointError where the folder holds something else, another sweep, or one at work.
    """
    finished = read_folder(sweep)
    sweep.output.mkdir(parents=True, exist_ok=True)
    if not (sweep.output / SWEEP_NAME).exists():
        write_whole(
            sweep.output / SWEEP_NAME, json.dumps(identity(sweep), indent=2, ensure_ascii=False) + "\n"
        )
    return finished


def read_folder(sweep: Sweep) -> list[Trial]:
    """The trials that are finished, by number; writes nothing. Raises as `open_folder`."""
    folder = sweep.output
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; name a folder in output")
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if not names:
        return []
    if SWEEP_NAME not in names:
        raise CheckpointError(
            f"output: {folder} is no sweep but holds other files ({', '.join(names[:3])}); name a new folder"
        )
    _check_same(sweep)
    _check_idle(folder)
    return read_trials(folder / TRIALS_NAME)


def identity(sweep: Sweep) -> dict[str, Any]:
    """What decides the trials and their results. How many there are and what is kept may change.

    Values of the recipe that nobody gave are left out, and so are tokens.
    """
    given = sweep.spec.model_dump(mode="json", exclude={"keep", "output", "recipe", "overrides"})
    given["search"].pop("trials", None)
    recipe = {}
    for path, value in leaves(sweep.base.recipe).items():
        key = dotted(path)
        known = sweep.base.origins.get(key, DEFAULT) != DEFAULT or path[-1] == "type"
        if known and key not in sweep.base.secrets and key != "train.output":
            recipe[key] = _plain(value)
    return {"sweep": given, "recipe": recipe}


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return to_jsonable_python(value)


def _check_same(sweep: Sweep) -> None:
    file = sweep.output / SWEEP_NAME
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        pairs = [(before[part], identity(sweep)[part]) for part in ("sweep", "recipe")]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged: {error!r}; name a new folder in output") from error
    changed = [
        key for old, new in pairs for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)
    ]
    if changed:
        raise CheckpointError(
            f"output: {sweep.output} holds another sweep; changed since: {', '.join(changed)}. "
            f"Name a new folder, or undo the change to go on"
        )


def read_trials(file: Path) -> list[Trial]:
    """The lines of `trials.jsonl`; a last one without its line end is what a killed writer left, and is dropped.

    Raises CheckpointError that names a damaged line.
    """
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    trials: dict[int, Trial] = {}
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            trial = Trial(**json.loads(line))
            trial = replace(trial, reports=tuple((step, value) for step, value in trial.reports))
            if trial.trial in trials:
                raise ValueError(f"trial {trial.trial} is there twice")
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{file}, line {number} is no trial: {error}; remove the line") from error
        trials[trial.trial] = trial
    return [trials[number] for number in sorted(trials)]


def append_trial(folder: Path, trial: Trial) -> None:
    """Add the line of a finished trial; it is on the disk when this returns."""
    file = folder / TRIALS_NAME
    line = json.dumps(asdict(trial), ensure_ascii=False) + "\n"
    kept = file.read_bytes() if file.exists() else b""
    if kept and not kept.endswith(b"\n"):
        write_whole(file, kept[: kept.rfind(b"\n") + 1])
    with file.open("a", encoding="utf-8") as stream:
        stream.write(line)
        stream.flush()
        os.fsync(stream.fileno())


# --------------------------------------------------------------------------------------------------
# Who is at work


def note_running(folder: Path, processes: Sequence[int]) -> None:
    """Write down which processes work in this folder."""
    known = [[number, psutil.Process(number).create_time()] for number in processes]
    write_whole(folder / RUNNING_NAME, json.dumps(known) + "\n")


def note_idle(folder: Path) -> None:
    (folder / RUNNING_NAME).unlink(missing_ok=True)


def _check_idle(folder: Path) -> None:
    """Raises CheckpointError where a process that this folder knows of is alive (numbers are used again)."""
    file = folder / RUNNING_NAME
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return
    for number, created in known:
        try:
            alive = psutil.Process(number).create_time() == created
        except psutil.NoSuchProcess:
            continue
        if alive:
            raise CheckpointError(f"process {number} is at work in {folder}; wait for it, or end it first")


# --------------------------------------------------------------------------------------------------
# The best


def best_of(trials: Sequence[Trial], *, minimizes: bool) -> Trial | None:
    """The best trial that ended well, the earliest of equals."""
    done = [trial for trial in trials if trial.status == "done" and trial.same_as is None]
    if not done:
        return None
    return min(done, key=lambda trial: (trial.value or 0.0) * (1 if minimizes else -1))


def write_best(sweep: Sweep, best: Trial, num_trials: int, loaded: LoadedRecipe) -> None:
    """`best.yaml`: the recipe of the best trial so far; `luthier train` runs it, into a folder beside it."""
    recipe = loaded.recipe
    train = recipe.train.model_copy(update={"output": str(sweep.output / "best")})
    origins = dict(loaded.origins) | {"train.output": "sweep"}
    origins |= {key: f"sweep, {trial_name(best.trial)}" for key in best.params if key in origins}
    loaded = replace(loaded, recipe=recipe.model_copy(update={"train": train}), origins=origins)
    head = (
        f"# The best of {num_trials} trials of {sweep.path}: {trial_name(best.trial)}, "
        f"{best.metric} {best.value:.6g}\n"
    )
    write_whole(sweep.output / BEST_NAME, head + dump_recipe(loaded))
