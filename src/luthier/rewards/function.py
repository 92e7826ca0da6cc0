"""Rewards of the user's own: Python functions that a recipe names.

    def reward(prompt: str, completion: str, row: dict) -> float: ...
    def reward(completions: list[Completion]) -> list[float]: ...

The first is asked of each answer: `prompt` is the last thing said before it, `row` the columns of the data file. A
function whose one parameter is called `completions` is given all of a rollout, as `luthier.experience.Completion` has
them: with tokens, log-probabilities, the whole conversation, and whether they were cut.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from luthier.experience import Completion
from luthier.recipe.online import FunctionRewardSpec
from luthier.rewards.base import EachAlone, Judge
from luthier.trainer.plugins import describe, load_named
from luthier.types import RecipeError

_FORMS = "reward(prompt, completion, row) -> float, or reward(completions) -> list of floats"


class OwnFunction(EachAlone):
    """A function that is asked of each answer."""

    def __init__(self, function: Callable[..., Any], name: str, path: str) -> None:
        super().__init__(name)
        self._function, self._path = function, path

    def score(self, completion: Completion) -> float:
        prompt = completion.prompt
        asked = prompt.conversation.messages[-1].content if prompt.conversation.messages else ""
        try:
            said: float = self._function(asked, completion.text, dict(prompt.row))
        except Exception as error:  # user code may raise anything; it is the cause of what is raised here
            raise self.fault(prompt, f"{self._path} failed: {_words(error)}") from error
        return said


class OwnFunctionOfAll(Judge):
    """A function that is asked of all answers at once."""

    def __init__(self, function: Callable[..., Any], name: str, path: str) -> None:
        super().__init__(name)
        self._function, self._path = function, path

    def __call__(self, completions: Sequence[Completion]) -> list[float]:
        if not completions:
            return []
        first = completions[0].prompt
        try:
            said = self._function(list(completions))
        except Exception as error:  # user code may raise anything; it is the cause of what is raised here
            about = f"{self._path} failed on {len(completions)} answers, this row's first: {_words(error)}"
            raise self.fault(first, about) from error
        if not isinstance(said, list | tuple | np.ndarray):
            raise self.fault(
                first, f"{self._path} returned {describe(said)} for {len(completions)} answers, not a list"
            )
        return list(said)


def own_function(spec: FunctionRewardSpec, name: str, key: str, beside: Path | None) -> Judge:
    """The function that a recipe names; `beside` is the recipe's folder.

    Raises RecipeError where it cannot be found, is no function, or cannot be called in either form.
    """
    found = load_named(spec.path, f"{key}.path", beside)
    if isinstance(found, type) or not callable(found):
        raise RecipeError(f"{key}.path: {spec.path} is {describe(found)}; a reward is a function: {_FORMS}")
    signature = inspect.signature(found)
    if list(signature.parameters) == ["completions"]:
        return OwnFunctionOfAll(found, name, spec.path)
    try:
        signature.bind("prompt", "completion", {})
    except TypeError:
        raise RecipeError(
            f"{key}.path: {spec.path} takes {signature}; a reward is a function: {_FORMS}"
        ) from None
    return OwnFunction(found, name, spec.path)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
