"""What a policy learns from when it writes its own answers: prompts, completions, rewards. Values, without torch.

Shape legend, beside that of `types`:
    P  prompts of a rollout     G  completions of each     B = P G  completions     L  tokens of one completion
    K  reward functions         N  tokens of all completions, those of a prompt beside each other
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from luthier.conversations import Conversation
from luthier.errors import LuthierError
from luthier.generation import Finish
from luthier.types import Stage

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

Floats = np.ndarray[Any, np.dtype[np.float32]]
Ids = np.ndarray[Any, np.dtype[np.int32]]


class RewardError(LuthierError):
    """A reward that could not be computed; names the reward and the row of data."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of a data set as something to be answered."""

    source: str
    """Name of the data set."""
    index: int
    """Position of the row in the data set, from 0."""
    ids: tuple[int, ...]
    """The tokens that the template renders, up to where the assistant begins to speak."""
    conversation: Conversation
    """Everything before the answer."""
    label: str | None = None
    """The answer that the data has, where it has one."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """The columns of the row as the file has them, for rewards that look things up in it."""

    @property
    def place(self) -> str:
        return f"{self.source}, row {self.index}"


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer that the policy sampled.

    `ids` (L,) are the tokens that it chose, the stop token among them, so L >= 1; `logprobs` (L,) are theirs under the
    weights that sampled, at the sampling temperature. `text` is the answer without special tokens.
    """

    prompt: Prompt
    ids: Ids
    logprobs: Floats
    text: str
    finish: Finish
    bad_scores: int = 0
    """Its steps at which the policy's scores had NaN or infinity among them."""

    @property
    def truncated(self) -> bool:
        """Whether it was cut by the limit of tokens."""
        return self.finish == "length"

    def __len__(self) -> int:
        return len(self.ids)


class Reward(Protocol):
    """Says how good completions are."""

    name: str
    """Of its column in logs."""

    def __call__(self, completions: Sequence[Completion]) -> list[float]:
        """One finite number for each. Raises RewardError, naming the row, where that fails."""
        ...


@dataclass(frozen=True, slots=True)
class Rollout:
    """Completions of one round of sampling and what is known of them before the first update.

    `rewards` (B, K) by function, `totals` (B,) their weighted sum. Of every token of every completion, in order:
    `logprobs` (N,) under the weights before the first update (recomputed by the policy), `sampled` (N,) as the engine
    said, `reference` (N,) of the reference model and `values` (N,) of the critic, the value of the state before the
    token, where the stage needs them.
    """

    completions: tuple[Completion, ...]
    group_size: int
    rewards: Floats
    totals: Floats
    logprobs: Floats
    sampled: Floats
    reference: Floats | None = None
    values: Floats | None = None

    @property
    def lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """(B,) tokens of each completion."""
        return np.array([len(completion) for completion in self.completions], np.int64)


class OnlineStage(Stage, Protocol):
    """A stage that learns from answers of its own.

    `encode` gives a prompt alone, a sample without targets. `collate` takes what a rollout made of it: samples whose
    branches are completions, with `signals` of their tokens. Its loss reads `Batch.signals`.
    """

    group_size: int
    """Answers to each prompt."""
    needs_values: bool
    """Whether a critic is asked."""
    temperature: float
    """At which answers are sampled, and log-probabilities taken."""

    def signals(self, rollout: Rollout, total: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """What the loss needs of each token, (N,) float32 by name, `advantages` among them.

        `total` adds a tensor of sums over all processes, for statistics that are those of the whole rollout.
        """
        ...

    def learnt(self, rollout: Rollout) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """(B,) whether each completion is learnt from."""
        ...

    def report(self, rollout: Rollout) -> dict[str, tuple[float, float]]:
        """Numbers of a rollout for the log: sum and weight by name."""
        ...

    def after(self, rollout: Rollout, means: Mapping[str, float]) -> None:
        """Adapt what is adapted between rollouts: the KL coefficient, the running moments of scores."""
        ...

    def state(self) -> dict[str, Any]:
        """What `after` changes, as JSON values: part of every checkpoint."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None: ...
