"""The verb `train`, in one process or many: data is prepared, and what can fail early found, before they start."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape

from luthier.data.report import check_max_lost, format_reports
from luthier.environment import detect_hardware, visible_gpus
from luthier.launch.agent import run_workers
from luthier.launch.handover import Handover
from luthier.launch.placement import Meeting, Placement, is_worker, place
from luthier.material import load_tokens, read_material
from luthier.model.load import locate
from luthier.recipe.load import LoadedRecipe, load_recipe
from luthier.recipe.resolve import resolve
from luthier.recipe.schema import Recipe
from luthier.run import TrainResult, train_resolved
from luthier.show import Say, quiet_libraries, speaker
from luthier.trainer.agreement import is_of_launch
from luthier.trainer.checkpoint import sweep_temporary
from luthier.trainer.retention import what_is_left
from luthier.trainer.run_directory import run_guard
from luthier.types import DataError, ProcessFailed, RecipeError


def train(
    recipe: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    quiet: bool = False,
    meeting: Meeting | None = None,
) -> TrainResult:
    """Run a recipe with all of its processes; see `luthier.train`.

    This process trains where there is one, or where it is itself one of several already (torchrun). Otherwise it
    starts those of this machine, and meets the launchers of the others as `meeting` says.
    """
    quiet_libraries()
    loaded, hardware = load_recipe(recipe, overrides), detect_hardware()
    if is_worker():
        if meeting is not None and meeting != Meeting():
            raise RecipeError("this process was started by torchrun, which has told it where the others are")
        return train_resolved(resolve(loaded, hardware), hardware, quiet=quiet)
    placement = place(loaded.recipe, visible_gpus(), meeting or Meeting())
    if placement.world_size == 1 and not loaded.recipe.parallel.max_restarts and not placement.meeting.run_id:
        return train_resolved(resolve(loaded, hardware), hardware, quiet=quiet)
    resolved = resolve(loaded, hardware.of(placement.world_size))
    threads = max(1, hardware.cores // placement.processes)
    return _launch(resolved, placement, threads, quiet)


def _launch(loaded: LoadedRecipe, placement: Placement, threads: int, quiet: bool) -> TrainResult:
    settings, run_id, say = loaded.recipe, placement.run_id, speaker(quiet)
    output, parallel = Path(settings.train.output), loaded.recipe.parallel
    if not is_of_launch(output, run_id):
        run_guard(output, overwrite=settings.train.overwrite, resume=settings.train.resume, remove=False)
    say(f"{_described(placement)}; preparing the data")
    _prepare(settings, say)
    folder = Path(tempfile.mkdtemp(prefix="luthier-launch-"))
    try:
        Handover(loaded, quiet, threads).write(folder)
        told, writes = run_workers(
            folder, placement, run_id, parallel.max_restarts, parallel.timeout, lambda text: say(escape(text))
        )
    except ProcessFailed as failure:
        if output.is_dir():
            sweep_temporary(output)
        raise ProcessFailed(f"{failure}\n{what_is_left(output, then='')}") from failure
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return TrainResult(output, told.metrics if writes else {})


def _described(placement: Placement) -> str:
    many = f"{placement.processes} process" + ("es" if placement.processes > 1 else "")
    return many if placement.nodes == 1 else f"{placement.nodes} machines with {many} each"


def _prepare(settings: Recipe, say: Say) -> None:
    """Tokenize the data into the cache, as `prepare` does, so that all workers find it there.

    Nobody waits for anybody meanwhile, however long it takes. Rows of a stream are tokenized in training.
    """
    if settings.data.stream is not None:
        return

    def silent(text: str) -> None:
        return None

    tokenizer, _ = load_tokens(settings, locate(settings.model), silent)
    reports = read_material(settings, tokenizer, silent, progress=say).data.reports
    try:
        check_max_lost(reports, settings.data.max_lost)
    except DataError:
        say(escape(format_reports(reports)))
        raise
