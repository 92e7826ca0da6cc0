"""What all rewards have in common: they are asked before the run whether they can judge its prompts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from luthier.experience import Completion, Prompt, RewardError


class Judge(ABC):
    """A reward (`experience.Reward`) that also knows before any answer which prompts it cannot judge."""

    def __init__(self, name: str) -> None:
        self.name = name

    def require(self, prompt: Prompt) -> None:  # noqa: B027  many can judge any prompt
        """Raise RewardError, naming the row, where answers to this prompt could not be judged."""

    @abstractmethod
    def __call__(self, completions: Sequence[Completion]) -> list[float]:
        """One number for each. Raises RewardError, naming the row, where that fails."""

    def fault(self, prompt: Prompt, words: str) -> RewardError:
        """The error to raise for a row."""
        return RewardError(f"reward {self.name}: {prompt.place}: {words}")


class EachAlone(Judge):
    """Judges one answer at a time."""

    @abstractmethod
    def score(self, completion: Completion) -> float:
        """The number of one answer."""

    def __call__(self, completions: Sequence[Completion]) -> list[float]:
        return [self.score(completion) for completion in completions]


def gold(judge: Judge, prompt: Prompt, column: str | None) -> str:
    """The answer that the row has: in `column`, else what the data set's format says.

    Raises RewardError where the row has none.
    """
    if column is None:
        if prompt.label is None:
            raise judge.fault(
                prompt, "the row has no answer to compare with; name its column with `column` of the reward"
            )
        return prompt.label
    value = prompt.row.get(column)
    if value is None:
        there = ", ".join(sorted(prompt.row)) or "none"
        raise judge.fault(prompt, f"the row has nothing in its column {column!r}; its columns are: {there}")
    return value if isinstance(value, str) else str(value)
