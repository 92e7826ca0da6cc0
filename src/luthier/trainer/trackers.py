"""Trackers: what a run logs also goes to TensorBoard, W&B, MLflow, SwanLab, trackio or another of transformers'.

The callbacks are transformers' own. What is added is where they write and into which of their runs: below
`<output>/trackers` unless the tracker's own variable names a place, and one tracked run for one run directory,
which the evaluation after training and a resumed run continue.

    tracker       written to                       elsewhere with            without a network
    tensorboard   trackers/tensorboard             TENSORBOARD_LOGGING_DIR   always
    wandb         trackers/wandb                   WANDB_DIR                 WANDB_MODE=offline
    mlflow        trackers/mlflow.db (SQLite)      MLFLOW_TRACKING_URI       always, unless that names a server
    swanlab       trackers/swanlab                 SWANLAB_LOG_DIR           SWANLAB_MODE=offline or local
    trackio       its own store for all projects   TRACKIO_DIR               always, unless a Space is named
"""

from __future__ import annotations

import copy
import json
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import integration_utils as integrations

from luthier.recipe.problems import nearest
from luthier.trainer.checkpoint import read_manifest
from luthier.trainer.run_directory import TRACKERS
from luthier.types import RecipeError

_IDENTITY = "run.json"


@dataclass(frozen=True, slots=True)
class _Place:
    """Where trackers of a run write, under which names."""

    folder: Path
    name: str
    id: str
    """Ours; the same for a resumed run."""
    step: int | None
    """The step that a resumed run goes on from."""

    def recall(self, key: str) -> str | None:
        """What this run, or the process that it goes on from, remembered."""
        value = _identity(self.folder).get(key)
        return None if value is None else str(value)

    def remember(self, key: str, value: str) -> None:
        text = json.dumps(_identity(self.folder) | {key: value})
        (self.folder / _IDENTITY).write_text(text + "\n", encoding="utf-8")


def _identity(folder: Path) -> dict[str, Any]:
    file = folder / _IDENTITY
    known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return known


def check_trackers(names: Sequence[str]) -> None:
    """Raise RecipeError for a tracker that transformers does not know, or whose library is not installed."""
    known = integrations.INTEGRATION_TO_CALLBACK
    for name in names:
        if name not in known:
            near = nearest(name, list(known))
            hint = f"did you mean {near}? " if near else ""
            raise RecipeError(
                f"train.report_to: {name!r} is no tracker; {hint}choose from {', '.join(sorted(known))}"
            )
        if name not in _OPEN:
            _others(name)


@contextmanager
def tracking(
    names: Sequence[str], output: Path, *, run_name: str | None, resumed: Path | None
) -> Iterator[list[TrainerCallback]]:
    """The callbacks of these trackers, their runs open inside the block and closed after it.

    `run_name` is what trackers call the run, the folder's name if absent; `resumed` is the checkpoint that the run
    goes on from. Raises RecipeError where a tracker refuses, as for a missing login.
    """
    if not names:
        yield []
        return
    place = _place(output, run_name, resumed)
    with ExitStack() as stack:
        yield [
            _OPEN[name](place, stack) if name in _OPEN else _others(name)
            for name in dict.fromkeys(names)  # each once
        ]


def _place(output: Path, run_name: str | None, resumed: Path | None) -> _Place:
    folder = output / TRACKERS
    folder.mkdir(exist_ok=True)
    known = _identity(folder).get("id") if resumed is not None else None
    step = int(read_manifest(resumed)["metadata"]["step"]) if resumed is not None else None
    place = _Place(folder, run_name or output.resolve().name, known or secrets.token_hex(4), step)
    if known is None:
        (folder / _IDENTITY).unlink(missing_ok=True)
        place.remember("id", place.id)
    return place


def _tensorboard(place: _Place, stack: ExitStack) -> TrainerCallback:
    from torch.utils.tensorboard.writer import SummaryWriter

    named = os.environ.get("TENSORBOARD_LOGGING_DIR", str(place.folder / "tensorboard"))
    folder = str(Path(named).expanduser())
    # What a killed process wrote after the checkpoint is shown no more.
    purged = None if place.step is None else place.step + 1
    writer = SummaryWriter(folder, purge_step=purged)
    callback = integrations.TensorBoardCallback(writer)  # type: ignore[no-untyped-call]
    callback.logging_dir = folder  # the evaluation after training opens another file beside the first

    def close() -> None:
        if callback.tb_writer is not None:
            callback.tb_writer.close()

    stack.callback(close)
    return callback


def _wandb(place: _Place, stack: ExitStack) -> TrainerCallback:
    import wandb

    callback = integrations.WandbCallback()  # type: ignore[no-untyped-call]
    if wandb.run is None:
        try:
            run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "huggingface"),
                name=place.name,
                id=os.environ.get("WANDB_RUN_ID", place.id),
                resume="allow",
                dir=os.environ.get("WANDB_DIR", str(place.folder)),
            )
        except wandb.errors.Error as error:
            raise RecipeError(
                f"train.report_to: wandb: {error}. WANDB_MODE=offline keeps the log on this machine"
            ) from error
        stack.push(lambda kind, error, trace: run.finish(exit_code=int(kind is not None)))
    return callback


def _mlflow(place: _Place, stack: ExitStack) -> TrainerCallback:
    if "MLFLOW_TRACKING_URI" not in os.environ:
        # A log that stays on this machine is nobody else's business; read as mlflow is imported.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    callback = integrations.MLflowCallback()  # type: ignore[no-untyped-call]
    if not mlflow.is_tracking_uri_set():
        mlflow.set_tracking_uri(f"sqlite:///{(place.folder / 'mlflow.db').resolve()}")
        stack.callback(mlflow.set_tracking_uri, None)
    if mlflow.active_run() is None:
        if (experiment := os.environ.get("MLFLOW_EXPERIMENT_NAME")) is not None:
            mlflow.set_experiment(experiment)
        known = os.environ.get("MLFLOW_RUN_ID", place.recall("mlflow"))
        run = mlflow.start_run(run_id=known, run_name=None if known else place.name)
        place.remember("mlflow", run.info.run_id)
        stack.push(lambda kind, error, trace: mlflow.end_run("FINISHED" if kind is None else "FAILED"))
    return callback


def _swanlab(place: _Place, stack: ExitStack) -> TrainerCallback:
    import swanlab

    callback = integrations.SwanLabCallback()  # type: ignore[no-untyped-call]
    if not swanlab.has_run():
        try:
            swanlab.init(
                project=os.environ.get("SWANLAB_PROJECT"),
                name=place.name,
                id=os.environ.get("SWANLAB_RUN_ID", place.id),
                resume=os.environ.get("SWANLAB_RESUME", "allow"),
                log_dir=os.environ.get("SWANLAB_LOG_DIR", str(place.folder / "swanlab")),
            )
        except RuntimeError as error:
            raise RecipeError(
                f"train.report_to: swanlab: {error} SWANLAB_MODE=offline keeps the log on this machine"
            ) from error
        stack.callback(swanlab.finish)
    return callback


class _TrackioCallback(integrations.TrackioCallback):
    """transformers' callback with a name for the run: without one, every `setup` begins another run."""

    def __init__(self, name: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._name = name

    def setup(self, args: TrainingArguments, state: TrainerState, model: Any, **kwargs: Any) -> None:
        named = copy.copy(args)
        named.run_name = self._name
        super().setup(named, state, model, **kwargs)  # type: ignore[no-untyped-call]


def _trackio(place: _Place, stack: ExitStack) -> TrainerCallback:
    import trackio

    # Its store holds runs of all folders, so a name alone would continue another one's run.
    stack.callback(trackio.finish)
    return _TrackioCallback(f"{place.name}-{place.id}")


def _others(name: str) -> TrainerCallback:
    """A tracker that has no place of its own here: exactly what transformers does."""
    try:
        callback: TrainerCallback = integrations.INTEGRATION_TO_CALLBACK[name]()
    except (RuntimeError, ImportError) as error:
        raise RecipeError(f"train.report_to: {name}: {error}") from error
    return callback


_OPEN: dict[str, Callable[[_Place, ExitStack], TrainerCallback]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "swanlab": _swanlab,
    "trackio": _trackio,
}
