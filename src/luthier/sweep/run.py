"""The verb `sweep`: trials one after another, each recorded before the next begins."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from luthier.recipe.source import dump_value
from luthier.recipe.sweep import Sweep, load_sweep
from luthier.show import Say, speaker
from luthier.sweep.records import (
    BEST_NAME,
    TRIALS_NAME,
    Trial,
    append_trial,
    best_of,
    note_idle,
    note_running,
    open_folder,
    read_folder,
    trial_name,
    write_best,
)
from luthier.sweep.search import Search, build_search
from luthier.sweep.space import Dimension, Params, check, dimensions, listed, recipe_of, shown
from luthier.sweep.trial import command, remove_weights, run_trial
from luthier.types import CheckpointError, LuthierError, RunInterrupted

SIGNALS = ("SIGTERM", "SIGHUP")
"""They stop a sweep as Ctrl-C does."""


@dataclass(frozen=True, slots=True)
class SweepResult:
    """The folder of a sweep, its trials in order, and the best of them."""

    output: Path
    trials: tuple[Trial, ...]
    best: Trial


def sweep(file: Path, *, quiet: bool = False) -> SweepResult:
    """Run the missing trials of a sweep file.

    Raises RecipeError before anything runs where a trial's recipe would not be accepted; CheckpointError where
    the folder belongs to something else; RunInterrupted where a signal stopped the sweep (the same command goes
    on); LuthierError where no trial ended well.
    """
    plan, space, trials = _read(file)
    search = build_search(plan, space, trials)
    say = speaker(quiet)
    finished = open_folder(plan)
    try:
        with _stopping_signals():
            note_running(plan.output, [os.getpid()])
            _conduct(plan, search, finished, say)
    except KeyboardInterrupt:
        raise RunInterrupted(
            f"stopped; {len(finished)} of {search.num_trials} trials are kept in {plan.output}. "
            f"The same command goes on"
        ) from None
    finally:
        note_idle(plan.output)
    best = best_of(finished, minimizes=plan.spec.minimizes)
    if not quiet:
        _print_summary(plan, finished)
    if best is None:
        last = finished[-1]
        raise LuthierError(
            f"no trial ended well; the last one: {last.error} "
            f"(see {plan.output / trial_name(last.trial)}.log)"
        )
    say(
        escape(
            f"best: {trial_name(best.trial)}, {best.metric} {best.value:.6g}\n"
            f"  its weights are in {plan.output / trial_name(best.trial)}; its recipe is {plan.output / BEST_NAME}"
        )
    )
    return SweepResult(plan.output, tuple(finished), best)


def dry_run(file: Path) -> str:
    """What `sweep` would do, as text; everything is checked and nothing is written."""
    plan, space, trials = _read(file)
    finished = {trial.trial: trial for trial in read_folder(plan)}
    goal = "minimize" if plan.spec.minimizes else "maximize"
    if trials is None:
        search = build_search(plan, space, trials)
        lines = [
            f"{search.num_trials} trials into {plan.output}, each chosen after the last, to {goal} {plan.spec.metric}"
        ]
        lines += [f"  {dimension.key}: {dimension.describe()}" for dimension in space]
    else:
        lines = [f"{len(trials)} trials into {plan.output}, to {goal} {plan.spec.metric}"]
        for number, params in enumerate(trials, start=1):
            known = finished.get(number)
            lines.append(f"  {trial_name(number)}  {shown(params)}{f'  ({known.status})' if known else ''}")
    return "\n".join(lines)


def _read(file: Path) -> tuple[Sweep, tuple[Dimension, ...], list[Params] | None]:
    plan = load_sweep(file)
    space = dimensions(plan)
    trials = listed(plan, space)
    check(plan, space, trials)
    return plan, space, trials


def _conduct(plan: Sweep, search: Search, finished: list[Trial], say: Say) -> None:
    """Go through all trials: what is recorded is told to the search again, what is missing runs.

    `finished` grows with every trial that ends.
    """
    recorded = {trial.trial: trial for trial in finished}
    finished.clear()
    for number in range(1, search.num_trials + 1):
        params = search.propose()
        trial = recorded.get(number)
        if trial is None:
            say(escape(f"{trial_name(number)} of {search.num_trials}: {shown(params)}"))
            trial = _run(plan, search, number, params, finished)
            append_trial(plan.output, trial)
            say(escape(f"  {_outcome(trial)}"))
        else:
            _replay(plan, search, trial, params)
        search.finished(trial.status, trial.value)
        finished.append(trial)
        if number not in recorded:
            _keep_best(plan, finished)
    _keep_best(plan, finished)  # again, for a sweep that was killed between a record and this


def _replay(plan: Sweep, search: Search, trial: Trial, params: Params) -> None:
    if trial.params != params:
        raise CheckpointError(
            f"{plan.output / TRIALS_NAME}: trial {trial.trial} was {shown(trial.params)} and would now be "
            f"{shown(params)}: lines before it, or the library that proposes trials, have changed. "
            f"Remove this line and those after it to go on, or name a new output"
        )
    for step, value in trial.reports:
        search.hopeless(step, value)


def _run(plan: Sweep, search: Search, number: int, params: Params, finished: Sequence[Trial]) -> Trial:
    """Run one trial, unless an earlier one had the same values: a run is a function of its recipe."""
    metric = plan.spec.metric
    for earlier in finished:
        if earlier.params == params and earlier.status == "done" and earlier.same_as is None:
            return Trial(number, params, "done", metric, earlier.value, 0.0, same_as=earlier.trial)
    reports: list[tuple[int, float]] = []

    def watch(step: int, value: float) -> bool:
        reports.append((step, value))
        return search.hopeless(step, value)

    folder = plan.output / trial_name(number)
    outcome = run_trial(
        command(plan.recipe_path, plan.words(params), folder, metric),
        folder,
        metric,
        watch if getattr(plan.spec.search, "pruner", None) else None,
        started=lambda process: note_running(plan.output, [os.getpid(), process]),
    )
    if outcome.interrupted:
        raise KeyboardInterrupt
    return Trial(
        number,
        params,
        outcome.status,
        metric,
        outcome.value,
        outcome.seconds,
        outcome.error,
        reports=tuple(reports),
    )


def _keep_best(plan: Sweep, finished: Sequence[Trial]) -> None:
    """Write the recipe of the best so far, and delete the weights of the others."""
    best = best_of(finished, minimizes=plan.spec.minimizes)
    if best is not None:
        write_best(plan, best, len(finished), recipe_of(plan, best.params))
    if plan.spec.keep == "best":
        for trial in finished:
            if best is None or trial.trial != best.trial:
                remove_weights(plan.output / trial_name(trial.trial))


# --------------------------------------------------------------------------------------------------
# What a person sees


def _outcome(trial: Trial) -> str:
    """How a trial ended, in a line."""
    if trial.same_as is not None:
        return f"{trial.metric} {trial.value:.6g}, as {trial_name(trial.same_as)} with the same values"
    if trial.status == "failed":
        return f"failed after {trial.seconds:.0f} s: {trial.error}"
    stopped = "stopped at " if trial.status == "pruned" else ""
    return f"{stopped}{trial.metric} {trial.value:.6g}, {trial.seconds:.0f} s"


def _print_summary(plan: Sweep, finished: Sequence[Trial]) -> None:
    """A table of all trials, the best first, then the stopped, then the failed."""
    sign = 1 if plan.spec.minimizes else -1
    order = ("done", "pruned", "failed")
    table = Table(title=escape(f"{plan.spec.metric} of {len(finished)} trials"))
    for title in ("trial", *plan.spec.space, plan.spec.metric, "status", "seconds"):
        table.add_column(escape(title), justify="left" if title in ("trial", "status") else "right")
    for trial in sorted(finished, key=lambda trial: (order.index(trial.status), sign * (trial.value or 0.0))):
        value = "" if trial.value is None else f"{trial.value:.6g}"
        cells = [dump_value(setting) for setting in trial.params.values()]
        cells = [trial_name(trial.trial), *cells, value, trial.status, f"{trial.seconds:.1f}"]
        table.add_row(*(escape(cell) for cell in cells))
    console = Console()
    console.print(table)
    for trial in finished:
        if trial.status == "failed":
            console.print(
                escape(f"{trial_name(trial.trial)}: {trial.error}"), highlight=False, soft_wrap=True
            )


# --------------------------------------------------------------------------------------------------
# Signals


@contextmanager
def _stopping_signals() -> Iterator[None]:
    """While entered, SIGTERM and SIGHUP raise KeyboardInterrupt, so that no trial is left behind at work."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
