"""What the loader of an online stage gives: which prompts are answered when. Nothing is sampled here.

An item is one optimizer step, as elsewhere: a number of a rollout, the number of its update, and the prompts. The
loader is read ahead, so answers are only sampled where the step is taken (`trainer.rollouts`). All of it is a pure
function of the seed, and a resumed run needs only its step.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch.utils.data import Dataset

_Purpose = Literal["order", "answers", "evaluation", "replacement", "minibatches"]
_PURPOSES: dict[_Purpose, int] = {
    "order": 0,
    "answers": 1,
    "evaluation": 2,
    "replacement": 3,
    "minibatches": 4,
}


def _sequence(seed: int, purpose: _Purpose, *numbers: int) -> np.random.SeedSequence:
    return np.random.SeedSequence([seed % 2**64, _PURPOSES[purpose], *numbers])


def answer_seed(seed: int, purpose: Literal["answers", "evaluation"], *numbers: int) -> int:
    """The seed of one answer, at least 0 and below 2^63: a function of its arguments alone."""
    return int(_sequence(seed, purpose, *numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def shuffled(
    count: int, seed: int, purpose: Literal["order", "replacement", "minibatches"], *numbers: int
) -> list[int]:
    """The numbers below `count` in an order that is a function of the arguments alone."""
    order: list[int] = np.random.default_rng(_sequence(seed, purpose, *numbers)).permutation(count).tolist()
    return order


def other_prompts(
    count: int, seed: int, rollout: int, attempt: int, *, used: Collection[int], wanted: int
) -> list[int]:
    """Up to `wanted` of the `count` prompts that are not among `used`: those that replace groups of equal rewards."""
    taken = set(used)
    order = shuffled(count, seed, "replacement", rollout, attempt)
    return [number for number in order if number not in taken][:wanted]


@dataclass(frozen=True, slots=True)
class RolloutStep:
    """One optimizer step: update `update` (from 0) of rollout `rollout` (from 0, of the whole run), whose prompts have
    the numbers `prompts`."""

    rollout: int
    update: int
    prompts: tuple[int, ...]


class RolloutSteps(Dataset[RolloutStep]):
    """The steps of an epoch, in which every prompt is answered in one rollout.

    What is left for the last rollout of an epoch makes a smaller one: no prompt comes twice to fill it.
    """

    def __init__(
        self, num_prompts: int, *, prompts_per_rollout: int, updates: int, seed: int, shuffle: bool = True
    ) -> None:
        self.num_samples = num_prompts
        self._size, self._updates = prompts_per_rollout, updates
        self._seed, self._shuffle = seed, shuffle
        self._rollouts = math.ceil(num_prompts / prompts_per_rollout)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        count = self.num_samples
        self._order = shuffled(count, self._seed, "order", epoch) if self._shuffle else list(range(count))

    def __len__(self) -> int:
        return self._rollouts * self._updates

    def __getitem__(self, step: int) -> RolloutStep:
        if not 0 <= step < len(self):
            raise IndexError(step)
        rollout, update = divmod(step, self._updates)
        prompts = self._order[rollout * self._size : (rollout + 1) * self._size]
        return RolloutStep(self.epoch * self._rollouts + rollout, update, tuple(prompts))
