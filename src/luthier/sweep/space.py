"""The space of a sweep: what each key may be, all combinations of a grid, draws, and whether a recipe takes them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from itertools import product
from random import Random
from typing import Any

from luthier.recipe.base import Spec
from luthier.recipe.load import LoadedRecipe
from luthier.recipe.problems import members
from luthier.recipe.schema import Recipe
from luthier.recipe.source import dump_value
from luthier.recipe.sweep import OptunaSpec, RandomSpec, RangeSpec, Sweep, trial_recipe, word
from luthier.types import RecipeError

Params = dict[str, Any]
"""The values of one trial by the keys of the space, in its order."""

_DIGITS = 6
"""Significant digits of a drawn number: enough to tell trials apart, few enough to be read."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One of a list of values."""

    key: str
    values: tuple[Any, ...]

    @property
    def count(self) -> int:
        return len(self.values)

    def at(self, index: int) -> Any:
        return self.values[index]

    def ends(self) -> tuple[Any, ...]:
        """The values that a check must try."""
        return self.values

    def draw(self, random: Random) -> Any:
        return self.values[random.randrange(self.count)]

    def describe(self) -> str:
        return ", ".join(dump_value(value) for value in self.values)


@dataclass(frozen=True, slots=True)
class Interval:
    """Numbers from `low` to `high`; `whole` ones where the recipe takes no others."""

    key: str
    low: int | float
    high: int | float
    log: bool
    step: int | float | None
    whole: bool

    @property
    def count(self) -> int | None:
        """How many values there are; None where they are dense."""
        step = self.step or (1 if self.whole else None)
        if step is None:
            return None
        return int((_exact(self.high) - _exact(self.low)) // _exact(step)) + 1

    def at(self, index: int) -> int | float:
        """low + index x step, without binary rounding."""
        value = _exact(self.low) + index * _exact(self.step or 1)
        return int(value) if self.whole else float(value)

    def ends(self) -> tuple[int | float, ...]:
        count = self.count
        return (self.at(0), self.at(count - 1)) if count else (float(self.low), float(self.high))

    def draw(self, random: Random) -> int | float:
        """Uniform, or with `log` uniform in the logarithm: a whole number stands for the half on either side."""
        if self.log:
            margin = 0.5 if self.whole else 0.0
            drawn = math.exp(random.uniform(math.log(self.low - margin), math.log(self.high + margin)))
            return self.nearest(drawn)
        if self.count is not None:
            return self.at(random.randrange(self.count))
        return self.nearest(random.uniform(self.low, self.high))

    def nearest(self, value: float) -> int | float:
        """The value of this interval that is meant by `value`: a whole one, one on a step, one of few digits."""
        if self.whole or self.step:
            step = _exact(self.step or 1)
            index = round((_exact(value) - _exact(self.low)) / step)
            return self.at(min(max(index, 0), (self.count or 1) - 1))
        return min(max(float(f"{value:.{_DIGITS}g}"), float(self.low)), float(self.high))

    def describe(self) -> str:
        how = ", equal ratios" if self.log else f", step {self.step}" if self.step else ""
        return f"{dump_value(self.low)} to {dump_value(self.high)}{how}"


Dimension = Choice | Interval


def _exact(number: float) -> Decimal:
    """The number as it is written, not as it is stored: 0.1 is a tenth."""
    return Decimal(repr(number))


def dimensions(sweep: Sweep) -> tuple[Dimension, ...]:
    """The space, each range with the kind of numbers that the recipe takes."""
    return tuple(
        _interval(key, values, sweep.base.recipe) if isinstance(values, RangeSpec) else Choice(key, values)
        for key, values in sweep.spec.space.items()
    )


def _interval(key: str, values: RangeSpec, recipe: Recipe) -> Interval:
    numbers = (values.low, values.high, values.step or 0)
    written_whole = all(isinstance(number, int) for number in numbers)
    kinds = members(_annotation(key, recipe))
    # A LLaMA-Factory key is not in the recipe's tree: there, what is written decides.
    whole = written_whole and float not in kinds
    return Interval(key, values.low, values.high, values.log, values.step, whole)


def _annotation(key: str, recipe: Recipe) -> Any:
    """What the recipe, with the kinds that it chose, says of a dotted key; None where it has no such key."""
    here: Any = recipe
    *sections, name = key.split(".")
    for section in sections:
        here = getattr(here, section, None)
    field = type(here).model_fields.get(name) if isinstance(here, Spec) else None
    return None if field is None else field.annotation


# --------------------------------------------------------------------------------------------------
# Trials that are known beforehand


def grid(space: tuple[Dimension, ...]) -> Iterator[Params]:
    """Every combination, the last key changing fastest."""
    for indices in product(*(range(dimension.count or 0) for dimension in space)):
        yield {dimension.key: dimension.at(index) for dimension, index in zip(space, indices, strict=True)}


def draws(space: tuple[Dimension, ...], search: RandomSpec) -> Iterator[Params]:
    """`search.trials` combinations, none twice; more trials begin with the same ones.

    Raises RecipeError where the space has fewer.
    """
    combinations = 1
    for dimension in space:
        combinations *= dimension.count or search.trials
    if combinations < search.trials:
        raise RecipeError(
            f"search.trials: {search.trials}, but the space has {combinations} combinations; "
            f"search: {{type: grid}} tries each"
        )
    random, seen = Random(search.seed), set[str]()
    while len(seen) < search.trials:
        params = {dimension.key: dimension.draw(random) for dimension in space}
        name = dump_value(params)
        if name not in seen:
            seen.add(name)
            yield params


def listed(sweep: Sweep, space: tuple[Dimension, ...]) -> list[Params] | None:
    """All trials, in order; None where the search decides as it goes."""
    search = sweep.spec.search
    if isinstance(search, RandomSpec):
        return list(draws(space, search))
    return None if isinstance(search, OptunaSpec) else list(grid(space))


# --------------------------------------------------------------------------------------------------
# Whether the recipe takes them


def check(sweep: Sweep, space: tuple[Dimension, ...], trials: list[Params] | None) -> None:
    """Read the recipe of every trial; of a search that decides as it goes, with each value and bound in turn.

    Raises RecipeError with every problem, in the order of the file, before anything has run.
    """
    if trials is None:
        first = {dimension.key: dimension.ends()[0] for dimension in space}
        trials = [
            first | {dimension.key: value} for dimension in space for value in dict.fromkeys(dimension.ends())
        ]
    problems: dict[str, list[Params]] = {}
    for params in trials:
        try:
            _check_metric(sweep, recipe_of(sweep, params).recipe)
        except RecipeError as error:
            for line in str(error).splitlines():
                problems.setdefault(line, []).append(params)
    if problems:
        raise RecipeError("\n".join(_with_cause(line, at, trials) for line, at in problems.items()))


def _with_cause(line: str, faulty: list[Params], trials: list[Params]) -> str:
    """The problem; with the values of its first trial, where not all trials that could have it do."""
    named = [key for key in faulty[0] if f": {word(key, faulty[0][key])}: " in line]
    could = [params for params in trials if all(params[key] == faulty[0][key] for key in named)]
    return line if len(faulty) == len(could) else f"{line} (with {shown(faulty[0])})"


def recipe_of(sweep: Sweep, params: Mapping[str, Any]) -> LoadedRecipe:
    """The recipe of one trial, without what the sweep sets itself."""
    return trial_recipe(sweep.document, sweep.recipe_path, sweep.spec.overrides, params)


def shown(params: Mapping[str, Any]) -> str:
    return " ".join(word(key, value) for key, value in params.items())


def _check_metric(sweep: Sweep, recipe: Recipe) -> None:
    """An evaluation's number needs an evaluation. Raises RecipeError."""
    metric, search = sweep.spec.metric, sweep.spec.search
    if metric.startswith("eval_"):
        text = None
        if not recipe.data.eval and not recipe.data.dev_split:
            text = f"{metric} needs data.eval or data.dev_split in the recipe"
        elif not recipe.train.eval_at_end:
            key = "do_eval" if sweep.base.llamafactory else "train.eval_at_end"
            text = f"{metric} needs {key}: true in the recipe"
        if text is not None:
            raise RecipeError(sweep.problem(("metric",), text))
    if isinstance(search, OptunaSpec) and search.pruner is not None:
        text = None
        if not metric.startswith("eval_"):
            text = f"judges a trial by its evaluations, and {metric} is known only at its end"
        elif recipe.train.eval_every is None:
            text = "judges a trial by its evaluations: give train.eval_every in the recipe"
        if text is not None:
            raise RecipeError(sweep.problem(("search", "pruner"), text))
