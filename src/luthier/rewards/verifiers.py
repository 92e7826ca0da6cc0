"""Rewards that libraries compute: reasoning-gym's verifiers and math-verify."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Mapping
from typing import Any

from luthier.environment import require
from luthier.experience import Completion, Prompt
from luthier.recipe.online import MathVerifySpec, ReasoningGymSpec
from luthier.recipe.problems import nearest
from luthier.rewards.base import EachAlone, gold
from luthier.types import RecipeError

_LATEX = ("$", "\\(", "\\[", "\\boxed")
_SECONDS = 5
"""That math-verify may take to read or to compare."""


class ReasoningGym(EachAlone):
    """What the verifier of a reasoning-gym task says, from 0 to 1, of what stands in the last `<answer>...</answer>`,
    or else of the whole answer.

    The row is what the library made: `answer`, and `metadata` with the name of the task.
    """

    def __init__(self, spec: ReasoningGymSpec, name: str, key: str) -> None:
        """`key` is the recipe's, for messages. Raises RecipeError where the library or the task is missing."""
        super().__init__(name)
        require("reasoning_gym", f"{key}: type=reasoning_gym")
        from reasoning_gym.factory import DATASETS, get_score_answer_fn
        from reasoning_gym.utils import extract_answer

        self._tasks, self._verifier_of, self._extract = DATASETS, get_score_answer_fn, extract_answer
        self._verifiers: dict[str, Callable[[str, Mapping[str, Any]], float]] = {}
        self._task = spec.task
        if spec.task is not None and spec.task not in DATASETS:
            near = nearest(spec.task, list(DATASETS))
            hint = f"; did you mean {near}?" if near else ""
            raise RecipeError(f"{key}.task: reasoning-gym has no task {spec.task!r}{hint}")

    def require(self, prompt: Prompt) -> None:
        self._entry(prompt)

    def score(self, completion: Completion) -> float:
        prompt, text = completion.prompt, completion.text
        task, entry = self._entry(prompt)
        if task not in self._verifiers:
            self._verifiers[task] = self._verifier_of(task)
        marked = self._extract(text)
        try:
            said: Any = self._verifiers[task](text.strip() if marked is None else marked, entry)
        except (
            Exception
        ) as error:  # a hundred verifiers by as many authors; it is the cause of what is raised
            raise self.fault(
                prompt, f"the verifier of {task} failed on {text[:100]!r}: {type(error).__name__}: {error}"
            ) from error
        if isinstance(said, bool) or (isinstance(said, int | float) and math.isfinite(said)):
            return float(said)
        raise self.fault(prompt, f"the verifier of {task} says {said!r}, which is no finite number")

    def _entry(self, prompt: Prompt) -> tuple[str, dict[str, Any]]:
        """The task of a row, and the row as the library made it."""
        metadata = prompt.row.get("metadata")
        if isinstance(metadata, str):  # tables of text keep it as JSON
            try:
                metadata = json.loads(metadata)
            except ValueError as error:
                raise self.fault(prompt, f"its metadata is no JSON: {error}") from error
        if not isinstance(metadata, Mapping):
            raise self.fault(prompt, "the row has no metadata of reasoning-gym, which its verifiers read")
        task = self._task if self._task is not None else metadata.get("source_dataset")
        if task not in self._tasks:
            raise self.fault(
                prompt, f"reasoning-gym has no task {task!r} (metadata.source_dataset); name one with `task`"
            )
        answer = prompt.row.get("answer", prompt.label)
        if answer is None and "answer" not in prompt.row:
            raise self.fault(prompt, "the row has no `answer` of reasoning-gym")
        entry = {**prompt.row, "answer": answer, "metadata": dict(metadata)}
        return str(task), entry


class MathVerify(EachAlone):
    """1 where math-verify takes the answer for the same as the row's, up to algebra; else 0.

    A row's answer without any mark of LaTeX is read as if it stood between dollars: by itself the library would find
    only the last number of an expression. What takes it longer than five seconds is not the same.
    """

    def __init__(self, spec: MathVerifySpec, name: str, key: str) -> None:
        """`key` is the recipe's, for messages. Raises RecipeError where the library is missing."""
        super().__init__(name)
        require("math_verify", f"{key}: type=math_verify")
        from math_verify import parse, verify

        self._parse, self._verify, self._column = parse, verify, spec.column

    def require(self, prompt: Prompt) -> None:
        self._wanted(prompt)

    def score(self, completion: Completion) -> float:
        wanted = self._wanted(completion.prompt)
        said = self._parse(completion.text, parsing_timeout=_seconds())
        return float(self._verify(wanted, said, timeout_seconds=_seconds()))

    def _wanted(self, prompt: Prompt) -> list[Any]:
        text = gold(self, prompt, self._column)
        marked = text if any(mark in text for mark in _LATEX) else f"${text}$"
        found: list[Any] = self._parse(marked, parsing_timeout=_seconds())
        if not found:
            raise self.fault(prompt, f"math-verify cannot read the row's answer: {text[:100]!r}")
        return found


def _seconds() -> int | None:
    """The library's limit is a signal, which only the main thread of a process may ask for."""
    return _SECONDS if threading.current_thread() is threading.main_thread() else None
