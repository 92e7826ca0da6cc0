"""Tasks of EleutherAI's lm-evaluation-harness on a judge: which there are, and what they found."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.environment import require
from luthier.evaluating.judge import Judge
from luthier.types import RecipeError

_BOOTSTRAP = 1000
"""Resamples for the standard errors of metrics that are no means of documents."""


@dataclass(frozen=True, slots=True)
class Tasks:
    """names: as lm-eval knows them. manager: its TaskManager. limit: documents of a task. chat: contexts as turns of a
    conversation in the model's template."""

    names: tuple[str, ...] = ()
    manager: Any = None
    limit: int | None = None
    chat: bool = False


def find_tasks(
    names: Sequence[str], folder: str | Path | None, limit: int | None, *, chat: bool = False
) -> Tasks:
    """The tasks of these names, those in the YAML files of `folder` among them.

    Raises RecipeError where lm-eval is not installed, and for names that it does not know.
    """
    if not names:
        if folder is not None:
            raise RecipeError(f"--tasks-folder {folder}: name its tasks with --lm-eval")
        return Tasks()
    require("lm_eval", "--lm-eval")
    if folder is not None and not Path(folder).is_dir():
        raise RecipeError(f"--tasks-folder {folder}: no such folder")
    from lm_eval.tasks import TaskManager

    manager = None
    if folder is not None:  # lm-eval's own thousands of tasks take seconds to list
        manager = TaskManager(include_path=str(folder), include_defaults=False)
    if manager is None or not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=None if folder is None else str(folder))
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise RecipeError(f"--lm-eval {name}: lm-eval has no such task{hint}")
    return Tasks(tuple(names), manager, limit, chat)


def run(judge: Judge, tasks: Tasks) -> dict[str, dict[str, dict[str, Any]]]:
    """Values and standard errors by task and metric (`acc`, or `acc (filter)`); empty without tasks."""
    if not tasks.names:
        return {}
    from lm_eval.evaluator import simple_evaluate

    from luthier.evaluating.harness_model import JudgeLM

    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    results: Any = simple_evaluate(
        model=JudgeLM(judge),
        tasks=list(tasks.names),
        task_manager=tasks.manager,
        limit=tasks.limit,
        bootstrap_iters=_BOOTSTRAP,
        log_samples=False,
        apply_chat_template=tasks.chat,
    )
    return {task: _metrics(found) for task, found in results["results"].items()}


def _metrics(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """lm-eval's keys are `metric,filter` and `metric_stderr,filter`."""
    metrics = {}
    for key, value in found.items():
        name, comma, kept = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = found.get(f"{name}_stderr,{kept}")
        label = name if kept == "none" else f"{name} ({kept})"
        metrics[label] = {"value": value, "stderr": error if isinstance(error, float) else None}
    return metrics
