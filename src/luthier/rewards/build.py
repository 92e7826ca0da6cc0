"""The rewards of a recipe, several at once with their weights, and what is checked of what they say."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from luthier.experience import Completion, Floats, Prompt, RewardError
from luthier.recipe.online import RewardSpec, reward_names
from luthier.rewards.base import Judge
from luthier.rewards.function import own_function
from luthier.rewards.models import scored_by_model
from luthier.rewards.rules import ExactMatch, Length, Numeric, Pattern
from luthier.rewards.service import Decode, Service
from luthier.rewards.verifiers import MathVerify, ReasoningGym
from luthier.trainer.plugins import describe

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What rewards are built in.

    decode: token ids to text by the policy's tokenizer, special tokens included. beside: the recipe's folder. policy:
    the model that trains, and policy_base the path that its base was loaded from, so that a reward adapter on the same
    base can share it. say: told how each reward model was loaded.
    """

    decode: Decode
    beside: Path | None = None
    policy: nn.Module | None = None
    policy_base: str | None = None
    say: Say = lambda text: None


REWARDS: dict[str, Callable[[Any, str, str, Surroundings], Judge]] = {
    "model": lambda spec, name, key, around: scored_by_model(
        spec, name, key, around.policy, around.policy_base, around.say
    ),
    "http": lambda spec, name, key, around: Service(spec, name, key, around.decode),
    "function": lambda spec, name, key, around: own_function(spec, name, key, around.beside),
    "exact_match": lambda spec, name, key, around: ExactMatch(spec, name),
    "numeric": lambda spec, name, key, around: Numeric(spec, name),
    "regex": lambda spec, name, key, around: Pattern(spec, name),
    "length": lambda spec, name, key, around: Length(spec, name),
    "reasoning_gym": lambda spec, name, key, around: ReasoningGym(spec, name, key),
    "math_verify": lambda spec, name, key, around: MathVerify(spec, name, key),
}
"""One builder for each type of `recipe.online.RewardSpec`: spec, name, the recipe's key, surroundings."""


class Rewards:
    """K reward functions and how much each counts.

    names: of their columns in logs. weights (K,) float32.
    """

    def __init__(self, judges: Sequence[Judge], weights: Sequence[float]) -> None:
        self._judges = tuple(judges)
        self.names = tuple(judge.name for judge in judges)
        self.weights: Floats = np.array(weights, np.float32)

    def require(self, prompts: Iterable[Prompt]) -> None:
        """Raise RewardError, naming the row, for the first prompt whose answers could not be judged: its row has no
        answer to compare with, say. Before the run, as far as that can be known then."""
        for prompt in prompts:
            for judge in self._judges:
                judge.require(prompt)

    def __call__(self, completions: Sequence[Completion]) -> Floats:
        """(B, K) what each function says of each answer, not weighted.

        Raises RewardError, naming the reward and the row, for a function that fails, or that says anything but one
        finite number for each answer.
        """
        found = np.empty((len(completions), len(self._judges)), np.float32)
        for column, judge in enumerate(self._judges):
            said = judge(completions)
            if len(said) != len(completions):
                place = completions[0].prompt.place if completions else "no answer"
                raise RewardError(
                    f"reward {judge.name}: {place}: it gave {len(said)} numbers for {len(completions)} answers, of "
                    "which this row's is the first"
                )
            for row, (completion, value) in enumerate(zip(completions, said, strict=True)):
                found[row, column] = _number(judge, completion, value)
        return found

    def totals(self, rewards: Floats) -> Floats:
        """(B,) the weighted sums of (B, K)."""
        return (rewards.astype(np.float64) @ self.weights.astype(np.float64)).astype(np.float32)


def build_rewards(
    specs: Sequence[RewardSpec],
    *,
    decode: Decode,
    beside: Path | None = None,
    policy: nn.Module | None = None,
    policy_base: str | None = None,
    say: Say = lambda text: None,
) -> Rewards:
    """The rewards that a recipe names under `stage.rewards`; the arguments are those of `Surroundings`.

    Call it once the policy is built and what it was built on is remembered (`model.base_record.remember_base`), and
    before its optimizer is. Raises RecipeError for what is written wrongly or not installed, ModelError for what is no
    reward model.
    """
    around = Surroundings(decode, beside, policy, policy_base, say)
    names = reward_names(specs)
    judges = [
        REWARDS[spec.type](spec, name, f"stage.rewards.{number}", around)
        for number, (spec, name) in enumerate(zip(specs, names, strict=True))
    ]
    return Rewards(judges, [spec.weight for spec in specs])


def _number(judge: Judge, completion: Completion, value: Any) -> float:
    """A value as a float32 can hold it. Raises RewardError for what is none, or not finite."""
    if not isinstance(value, numbers.Real | np.bool_):
        raise judge.fault(completion.prompt, f"it returned {describe(value)}, where a number is expected")
    try:
        number = float(value)
    except OverflowError:
        number = float("inf")
    with np.errstate(over="ignore"):
        finite = bool(np.isfinite(np.float32(number)))
    if not finite:
        raise judge.fault(completion.prompt, f"it returned {value!r:.40}, which is no finite float32")
    return number
