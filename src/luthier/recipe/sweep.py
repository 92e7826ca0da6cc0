"""A sweep file: which values of a recipe to try, how, and what decides which trial is the best.

Typed and checked like a recipe (unknown keys, lines, hints), and as torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from luthier.recipe.base import Spec
from luthier.recipe.load import LoadedRecipe, load_recipe
from luthier.recipe.problems import validate_as
from luthier.recipe.resolve import lower_is_better
from luthier.recipe.source import Document, KeyPath, Place, dump_value, read_file
from luthier.types import RecipeError

OWN_KEYS = {
    "train.output": "output_dir",
    "train.resume": "resume_from_checkpoint",
    "train.overwrite": "overwrite_output_dir",
    "train.push_to_hub": "push_to_hub",
}
"""What a sweep sets in each trial itself, by its native and its LLaMA-Factory name."""

_KEY = re.compile(r"[^\s=]+")
_SHAPE = (
    "a sweep names at least recipe and space",
    "a sweep is a mapping of keys (`recipe:`, `search:`, `space:`, ...)",
)


class RangeSpec(Spec):
    """Numbers from `low` to `high`, both included. Real numbers, unless the recipe takes only whole ones."""

    low: int | float
    high: int | float
    log: bool = False
    """Equal chances for equal ratios instead of equal differences."""
    step: int | float | None = None
    """Only low, low + step, low + 2 step, ...; absent: every number between."""

    @model_validator(mode="after")
    def _ordered(self) -> RangeSpec:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) should be below high ({self.high})")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs low above 0, found {self.low}")
        if self.log and self.step is not None:
            raise ValueError("log and step exclude each other; give one, or list the values")
        if self.step is not None and self.step <= 0:
            raise ValueError(f"step should be above 0, found {self.step}")
        return self


class GridSpec(Spec):
    """Every combination; the last key of `space` changes fastest."""

    type: Literal["grid"] = "grid"


class RandomSpec(Spec):
    """Combinations drawn at random, none twice."""

    type: Literal["random"] = "random"
    trials: int = Field(gt=0)
    """How many runs; a larger number goes on with a finished sweep."""
    seed: int = 0


class OptunaSpec(Spec):
    """The tree-structured Parzen estimator (Bergstra et al., 2011, NeurIPS 24) of the library optuna."""

    type: Literal["optuna"] = "optuna"
    trials: int = Field(gt=0)
    """How many runs; a larger number goes on with a finished sweep."""
    seed: int = 0
    startup_trials: int = Field(default=10, gt=0)
    """Trials drawn at random before the estimator begins."""
    pruner: Literal["median"] | None = None
    """`median`: stop a trial whose best value so far is worse than the median of the others at that step."""
    prune_after_trials: int = Field(default=5, gt=0)
    """With `pruner`: finished trials before the first is stopped."""
    prune_after_steps: int = Field(default=0, ge=0)
    """With `pruner`: optimizer steps that every trial may make."""


SearchSpec = Annotated[GridSpec | RandomSpec | OptunaSpec, Field(discriminator="type")]


class SweepSpec(Spec):
    """Many runs of one recipe with other values."""

    recipe: str
    """A native or LLaMA-Factory recipe; relative to the sweep file."""
    search: SearchSpec = GridSpec()
    metric: str = "eval_loss"
    """A number that a run ends with (`all_results.json`)."""
    direction: Literal["minimize", "maximize"] | None = None
    """Absent: minimize losses, perplexity and what ends in `/rejected`, maximize others."""
    space: dict[str, RangeSpec | tuple[Any, ...]]
    """Keys of the recipe, and for each a list of values or a range."""
    overrides: tuple[str, ...] = ()
    """KEY=VALUE for every trial, as on the command line."""
    output: str = "sweeps/luthier"
    """The folder of the sweep; absent: sweeps/ and the name of the sweep file."""
    keep: Literal["best", "all"] = "best"
    """Whose weights stay."""

    @field_validator("space")
    @classmethod
    def _something_to_try(cls, space: dict[str, Any]) -> dict[str, Any]:
        if not space:
            raise ValueError("is empty: name at least one key of the recipe and its values")
        return space

    @property
    def minimizes(self) -> bool:
        if self.direction is not None:
            return self.direction == "minimize"
        return lower_is_better(self.metric)


@dataclass(frozen=True)
class Sweep:
    """A sweep file, and the recipe that it starts from."""

    spec: SweepSpec
    path: Path
    recipe_path: Path
    base: LoadedRecipe
    """The recipe with the sweep's overrides and nothing from its space."""
    document: Document

    @property
    def output(self) -> Path:
        return Path(self.spec.output)

    def words(self, params: Mapping[str, Any]) -> list[str]:
        """The command-line words that make the recipe into a trial's."""
        return [*self.spec.overrides, *(word(key, value) for key, value in params.items())]

    def problem(self, path: KeyPath, text: str) -> str:
        return self.document.problem(path, text)


def word(key: str, value: Any) -> str:
    """`KEY=VALUE`, read back as the same value."""
    return f"{key}={dump_value(value)}"


def load_sweep(path: Path) -> Sweep:
    """Read a sweep file and its recipe. Raises RecipeError that names file, line and key of every problem."""
    document = read_file(path, shape=_SHAPE)
    if document.tree.get("output") is None:
        place = Place("output", origin="default")
        document.set(("output",), f"sweeps/{path.stem}", place)
    spec = validate_as(SweepSpec, document)
    problems = _own_problems(spec, document)
    recipe_path = path.parent / spec.recipe
    if not recipe_path.is_file():
        problems.append(document.problem(("recipe",), f"no such file: {recipe_path}"))
    if problems:
        raise RecipeError("\n".join(problems))
    base = trial_recipe(document, recipe_path, spec.overrides, {})
    return Sweep(spec, path, recipe_path, base, document)


def trial_recipe(
    document: Document, recipe_path: Path, overrides: Sequence[str], params: Mapping[str, Any]
) -> LoadedRecipe:
    """The recipe of one trial. Raises RecipeError whose lines name the place in the sweep file."""
    places: dict[str, KeyPath] = {text: ("overrides", at) for at, text in enumerate(overrides)}
    places |= {word(key, value): ("space", key) for key, value in params.items()}
    try:
        return load_recipe(recipe_path, list(places))
    except RecipeError as error:
        lines = [_in_sweep(line, places, document) for line in str(error).splitlines()]
        raise RecipeError("\n".join(lines)) from None


def _in_sweep(line: str, places: Mapping[str, KeyPath], document: Document) -> str:
    """A message about a command-line word, with the place in the sweep file where the word stands."""
    for text, path in places.items():
        start = f"command line: {text}: "
        if line.startswith(start):
            return document.problem(path, f"{text}: {line.removeprefix(start)}")
    return line


def _own_problems(spec: SweepSpec, document: Document) -> list[str]:
    """What the types do not say: keys that are the sweep's own, given twice, or inside one another."""
    problems = []
    given = {text.partition("=")[0].strip().removeprefix("--"): at for at, text in enumerate(spec.overrides)}
    own = {**OWN_KEYS, **{flat: native for native, flat in OWN_KEYS.items()}}
    taken = "a sweep sets this in every trial itself; remove it"
    for key, at in given.items():
        if key in own:
            problems.append(document.problem(("overrides", at), f"{key}: {taken}"))
    for key, values in spec.space.items():
        path: KeyPath = ("space", key)
        around = [other for other in spec.space if key.startswith(f"{other}.")]
        if not _KEY.fullmatch(key):
            problems.append(document.problem(path, "should be a key of the recipe, for example optim.lr"))
        elif key in own:
            problems.append(document.problem(path, taken))
        elif key in given:
            problems.append(document.problem(path, "stands in overrides, too; keep one"))
        elif around:
            problems.append(document.problem(path, f"is inside space.{around[0]}; keep one"))
        elif isinstance(values, tuple) and not values:
            problems.append(document.problem(path, "is an empty list; name the values to try"))
        elif isinstance(values, tuple):
            texts = [dump_value(value) for value in values]
            twice = [text for at, text in enumerate(texts) if text in texts[:at]]
            problems += [document.problem(path, f"{text} stands there twice") for text in twice[:1]]
        elif isinstance(spec.search, GridSpec) and values.step is None:
            problems.append(
                document.problem(path, "a grid needs a list of values or a step; random and optuna draw")
            )
    return problems
