"""How often a reward model prefers the better answer of a pair: on its run's own evaluation sets, or on any file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.answering import parts_of
from luthier.data.registry import resolve_datasets
from luthier.evaluating.sets import prepared
from luthier.measures.intervals import ends, share_difference, wilson
from luthier.recipe.schema import Recipe
from luthier.score import Scores, score_file
from luthier.trained.source import Trained
from luthier.trained.template import trained_template
from luthier.types import DataError, ModelError, RecipeError


@dataclass(frozen=True, slots=True)
class PairSet:
    """Rows of files: all of each, or those with these numbers."""

    name: str
    files: Mapping[Path, frozenset[int] | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Preferred:
    """right: 1 for each pair whose better answer scores more, 0.5 for a tie, else 0, by file and row; margins of the
    same; not_scored: rows without scores."""

    right: Mapping[tuple[Path, int], float]
    margins: Sequence[float]
    not_scored: int

    def to_dict(self) -> dict[str, Any]:
        num, right = len(self.right), math.fsum(self.right.values())
        return {
            "rows": num,
            "not_scored": self.not_scored,
            "accuracy": right / num,
            "interval": ends(wilson(right, num)),
            "mean_margin": math.fsum(self.margins) / num,
        }


def compare(
    trained: Trained, target: str | Path, names: Sequence[str], against: str | None, base: str | None
) -> list[dict[str, Any]]:
    """The accuracy on every set, of the target and of the model that it is compared with.

    Raises RecipeError where there is nothing to evaluate on, DataError for files without pairs, ModelError for what is
    no reward model.
    """
    other = None if against is None else parts_of(against)
    if other is not None and other.kind != "reward":
        raise ModelError(f"--against {against}: {target} is a reward model, and this is none")
    sets = [_named(name, trained.recipe) for name in names] or _own(trained)
    found = []
    for one in sets:
        mine = _preferred(one, target, base)
        entry: dict[str, Any] = {"name": one.name, "target": mine.to_dict()}
        if other is not None:
            theirs = _preferred(one, str(against), None)
            entry |= {"against": theirs.to_dict(), "difference": _difference(mine, theirs)}
        found.append(entry)
    return found


def _named(name: str, run: Recipe | None) -> PairSet:
    if Path(name).is_file():
        return PairSet(Path(name).stem, {Path(name): None})
    if run is None:
        raise DataError(f"--pairs {name}: no such file")
    (attr,) = resolve_datasets([name], run.data)
    return PairSet(attr.name, {Path(attr.path): None})


def _own(trained: Trained) -> list[PairSet]:
    """The evaluation sets of the run: whole files, and the rows that dev_split held out."""
    run = trained.recipe
    if run is None or not (run.data.eval or run.data.dev_split):
        raise RecipeError(
            f"{trained.label} has no evaluation sets of its own; name ranking data with --pairs"
        )
    attrs = resolve_datasets([*run.data.train, *run.data.eval], run.data)
    paths = {attr.name: Path(attr.path) for attr in attrs if attr.load_from == "file"}
    found = []
    for name, table in prepared(run, trained_template(trained, lambda text: None))[1].eval.items():
        files: dict[Path, set[int]] = {}
        for sample in table:
            if sample.source not in paths:
                raise RecipeError(f"{sample.source} is no file; name ranking data in a file with --pairs")
            files.setdefault(paths[sample.source], set()).add(sample.index)
        found.append(PairSet(name, {path: frozenset(rows) for path, rows in files.items()}))
    return found


def _preferred(one: PairSet, model: str | Path, base: str | None) -> Preferred:
    right: dict[tuple[Path, int], float] = {}
    margins, not_scored = [], 0
    for path, rows in one.files.items():
        scores: Scores = score_file(model, path, base=base)
        for row in scores.rows:
            if rows is not None and row.index not in rows:
                continue
            if row.reason is not None:
                not_scored += 1
                continue
            if len(row.scores) != 2:
                raise DataError(
                    f"{path}, row {row.index}: one answer, and pairs (chosen, rejected) are expected"
                )
            margin = row.scores[0] - row.scores[1]
            right[path, row.index] = 1.0 if margin > 0 else 0.5 if margin == 0 else 0.0
            margins.append(margin)
    if not right:
        raise DataError(f"{one.name}: no row has scores of two answers")
    return Preferred(right, margins, not_scored)


def _difference(mine: Preferred, theirs: Preferred) -> dict[str, Any]:
    shared = [key for key in mine.right if key in theirs.right]
    first, second = ([one.right[key] for key in shared] for one in (mine, theirs))
    value = (math.fsum(first) - math.fsum(second)) / len(shared) if shared else None
    return {"value": value, "interval": ends(share_difference(first, second)), "rows": len(shared)}
