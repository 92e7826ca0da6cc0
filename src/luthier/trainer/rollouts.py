"""Rollouts: where the answers come from that ppo and grpo learn from, and what becomes of them.

At the first update of a rollout the policy as it is answers the prompts, the answers are rewarded, and policy,
reference and critic are asked about their tokens once more by the numeric kernel of training, because a sampler rounds
otherwise. Then come epochs x minibatches optimizer steps on what the stage makes of that. Nothing here knows a loss.

Several processes answer a share of the prompts each, and tell each other what came of it: every one of them knows the
whole rollout, so its statistics, what is replaced or left out, the log and the checkpoint are those of one process.
Of an update each goes through its share of the passes.

The experience of the rollout under way is part of every checkpoint, so that a run goes on in the middle of one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.numpy import load_file

from luthier.experience import Completion, Floats, OnlineStage, Prompt, Rollout
from luthier.recipe.online import OnlineSpec
from luthier.trainer.before_update import Asking as Asking, Layout as Layout, known
from luthier.trainer.evaluation import without_dropout
from luthier.trainer.experience_passes import (
    IDLE,
    Piece,
    from_arrays,
    learnt_samples,
    minibatch,
    part_of,
    shared_out,
    sources_of,
    to_arrays,
)
from luthier.trainer.processes import ALONE, Processes
from luthier.trainer.rollout_steps import RolloutStep, answer_seed, other_prompts
from luthier.trainer.sample_record import SampleRecord
from luthier.trainer.saving import EXPERIENCE_NAME
from luthier.types import Batch, LuthierError, Sample, Term


class SamplingInterrupted(LuthierError):
    """A signal came while answers were sampled: the step has not begun, and nothing of it is kept."""


Ask = tuple[Prompt, int]
"""A prompt, and the seed of its answer."""


class Sampler(Protocol):
    """Answers prompts with the policy as it is."""

    def __call__(self, asked: Sequence[Ask], *, interruptible: bool) -> list[Completion]:
        """A completion for each, in order. Raises SamplingInterrupted where a signal came, if `interruptible`."""
        ...


class Scoring(Protocol):
    """K rewards."""

    names: tuple[str, ...]

    def __call__(self, completions: Sequence[Completion]) -> Floats:
        """(B, K) what each says of each completion. Raises RewardError, naming the row, where one fails."""
        ...

    def totals(self, rewards: Floats) -> Floats:
        """(B,) the weighted sums of (B, K)."""
        ...


@dataclass(frozen=True, slots=True)
class _Group:
    """The answers to one prompt."""

    completions: tuple[Completion, ...]
    rewards: Floats
    totals: Floats

    @property
    def is_equal(self) -> bool:
        """Whether there is nothing to tell the answers apart by."""
        return bool(np.ptp(self.totals) == 0)

    def told(self) -> tuple[Any, ...]:
        """What another process needs to know, which has the prompts itself; `of` reads it."""
        answers = [(one.ids, one.logprobs, one.text, one.finish) for one in self.completions]
        return answers, self.rewards, self.totals

    @classmethod
    def of(cls, prompt: Prompt, answers: Sequence[Any], rewards: Floats, totals: Floats) -> _Group:
        return cls(tuple(Completion(prompt, *one) for one in answers), rewards, totals)


@dataclass(slots=True)
class Rollouts:
    """Samples rollouts and hands out their updates, one after the other."""

    stage: OnlineStage
    spec: OnlineSpec
    prompts: Sequence[Prompt]
    sample: Sampler
    score: Scoring
    layout: Layout
    seed: int
    record: SampleRecord | None = None
    """Of the process that writes files."""
    processes: Processes = ALONE
    current: list[Batch] = field(init=False, default_factory=list)
    """The passes of the update under way."""
    metrics: dict[str, Term] = field(init=False, default_factory=dict)
    """What is to be logged of the step under way, besides what its loss says."""
    _samples: list[Sample] = field(init=False, default_factory=list)
    """The experience of rollout `_number`; none where the rest of its updates is left out."""
    _number: int = field(init=False, default=-1)
    _update: int = field(init=False, default=0)
    _begun: float = field(init=False, default=0.0)
    _spent: _Spent = field(init=False, default_factory=lambda: _Spent())

    # ---- a step ----------------------------------------------------------------------------------------

    def passes(self, step: RolloutStep, asking: Asking) -> list[Batch]:
        """The passes of an update; before the first of a rollout its answers are sampled.

        None where there is nothing to learn: the policy moved further than `target_kl`, the rollout has too few
        answers, or it was never sampled because the run was rewound. Raises SamplingInterrupted, RewardError.
        """
        self.metrics, self.current = {}, []
        if step.update == 0:
            self._begin(step, asking)
        self._update, self._begun = step.update, time.monotonic()
        if self._samples and self._number == step.rollout:
            self.current = self._cut(step.update)
        if not self.current and step.update == self.spec.updates - 1:
            self._samples = []
        if self.spec.target_kl is not None or not self.current:
            self.metrics["updates_left_out"] = _term(not self.current)
        return self.current

    def updated(self, metrics: Mapping[str, Term]) -> dict[str, Term]:
        """Note an update that was made, whose sums are `metrics`; returns what else is to be logged of it.

        Once `approx_kl` is more than `target_kl`, there is no further update of the rollout.
        """
        seconds = time.monotonic() - self._begun
        tokens = sum(batch.num_tokens for batch in self.current)
        moved = metrics.get("approx_kl")
        limit = self.spec.target_kl
        too_far = False
        if limit is not None and moved is not None:
            total, weight = self.processes.total((float(moved.total), float(moved.weight)))
            too_far = weight > 0 and total / weight > limit
        if too_far or self._update == self.spec.updates - 1:
            self._samples = []
        rate = _term(tokens, seconds / self.processes.count)  # the tokens of all in the time of each
        speed = {"update_seconds": _term(seconds), "update_tokens_per_second": rate}
        return {**self.metrics, **speed}

    def _cut(self, update: int) -> list[Batch]:
        """This process's passes; one of a token that teaches nothing where only others have any."""
        pieces = minibatch(self._samples, update, self.spec.minibatches, self.seed, self._number)
        if not pieces:
            return []
        own = shared_out(self._samples, pieces, self.processes.count)[self.processes.rank]
        if not own:
            return [self.stage.collate([IDLE])]
        return [self._collated(group) for group in self.layout.cut(self._samples, own)]

    def _collated(self, group: Sequence[Piece]) -> Batch:
        return self.stage.collate([part_of(self._samples[piece.sample], piece) for piece in group])

    # ---- smaller passes (`train.fit_memory`)

    @property
    def tokens_per_pass(self) -> int:
        """Most tokens of a pass."""
        return self.layout.tokens_per_pass

    def limit_passes(self, tokens: int) -> None:
        """Cut this update and all later ones into passes of at most `tokens` tokens."""
        self.layout = replace(self.layout, tokens_per_pass=tokens)

    def again(self, step: int) -> list[Batch]:
        """The passes of the update under way once more, as they are cut now; `step` is that of the run."""
        self.current = self._cut(self._update)
        return self.current

    # ---- a rollout -------------------------------------------------------------------------------------

    def _begin(self, step: RolloutStep, asking: Asking) -> None:
        """Sample, reward, and ask what is known of the answers before the first update."""
        self._samples, self._number, self._spent = [], step.rollout, _Spent()
        begun = time.monotonic()
        with torch.random.fork_rng(), asking.arithmetic(), without_dropout(asking.model):
            groups, replaced = self._groups(step)
        rollout = self._known(groups, asking)
        seconds = time.monotonic() - begun
        signals = self.stage.signals(rollout, _as_it_is)
        arrays = {name: values.float().cpu().numpy() for name, values in signals.items()}
        self._samples = learnt_samples(rollout, self.stage.learnt(rollout), arrays)
        report = self.stage.report(rollout)
        self.metrics = {name: _term(*sums) for name, sums in report.items()}
        if hasattr(self.spec, "dynamic_sampling"):
            self.metrics["groups_replaced"] = _term(replaced)
        spent = self._spent
        self.metrics |= {
            "rollout_seconds": _term(seconds),
            "rollout_tokens_per_second": _term(spent.tokens, seconds / self.processes.count),
            "sampling_seconds": _term(spent.sampling),
            "reward_seconds": _term(spent.rewards),
        }
        self.stage.after(
            rollout, {name: total / weight for name, (total, weight) in report.items() if weight}
        )
        if self.record is not None:
            self.record.add(asking.step, step.rollout, rollout, self.score.names)

    def _groups(self, step: RolloutStep) -> tuple[list[_Group], int]:
        """The answers to the step's prompts, and how many groups were replaced.

        With `dynamic_sampling`, a group of equal rewards makes room for another prompt's (DAPO, arXiv:2503.14476,
        section 3.2); one that is left after the last round, or when no prompt is, stays.
        """
        groups = self._answered(step.prompts, step.rollout, 0)
        used, replaced = set(step.prompts), 0
        for attempt in range(1, getattr(self.spec, "dynamic_sampling", 0) + 1):
            equal = [place for place, group in enumerate(groups) if group.is_equal]
            drawn = other_prompts(
                len(self.prompts), self.seed, step.rollout, attempt, used=used, wanted=len(equal)
            )
            if not drawn:
                break
            used |= set(drawn)
            replaced += len(drawn)
            others = self._answered(drawn, step.rollout, attempt)
            for place, group in zip(equal, others, strict=False):
                groups[place] = group
        return groups, replaced

    def _answered(self, numbers: Sequence[int], rollout: int, attempt: int) -> list[_Group]:
        """The answers to these prompts, of which this process samples and rewards its share."""
        own = self.processes.share(numbers)
        groups = self.processes.together(lambda: self._own_groups(own, rollout, attempt))
        told = self.processes.joined([group.told() for group in groups])
        return [_Group.of(self.prompts[number], *group) for number, group in zip(numbers, told, strict=True)]

    def _own_groups(self, numbers: Sequence[int], rollout: int, attempt: int) -> list[_Group]:
        size, asked = self.stage.group_size, list[Ask]()
        for number in numbers:
            prompt = self.prompts[number]
            asked += [
                (prompt, answer_seed(self.seed, "answers", rollout, attempt, number, k)) for k in range(size)
            ]
        if not asked:
            return []
        begun = time.monotonic()
        completions = self.sample(asked, interruptible=True)
        sampled = time.monotonic()
        rewards = self.score(completions)
        totals = self.score.totals(rewards)
        self._spent.sampling += sampled - begun
        self._spent.rewards += time.monotonic() - sampled
        self._spent.tokens += sum(len(completion) for completion in completions)
        bounds = [slice(start, start + size) for start in range(0, len(completions), size)]
        return [_Group(tuple(completions[one]), rewards[one], totals[one]) for one in bounds]

    def _known(self, groups: Sequence[_Group], asking: Asking) -> Rollout:
        """What is known of the answers before the first update.

        Where its one update is all that this would serve, the ratio is to the policy itself, and it is not asked.
        """
        rollout = self._rollout(groups)
        further = (
            self.stage.needs_reference or self.stage.needs_values or self.spec.importance_cap is not None
        )
        if self.spec.updates == 1 and not further:
            return rollout
        own = self.processes.share(groups)
        said = self.processes.joined(self.processes.together(lambda: self._asked(own, asking)))
        logprobs, reference, values = (
            None if parts[0] is None else np.concatenate(parts) for parts in zip(*said, strict=True)
        )
        assert logprobs is not None
        return replace(rollout, logprobs=logprobs, reference=reference, values=values)

    def _asked(self, groups: Sequence[_Group], asking: Asking) -> list[tuple[Floats | None, ...]]:
        """Log-probabilities, the reference's, and values of each group's tokens."""
        if not groups:
            return []
        said = known(self._rollout(groups), self.stage, self.layout, asking)
        ends = np.cumsum([sum(map(len, group.completions)) for group in groups])[:-1]
        columns = (said.logprobs, said.reference, said.values)
        parts = [[None] * len(groups) if one is None else np.split(one, ends) for one in columns]
        return list(zip(*parts, strict=True))

    def _rollout(self, groups: Sequence[_Group]) -> Rollout:
        """These answers, as the sampler knows them."""
        completions = tuple(completion for group in groups for completion in group.completions)
        sampled = np.concatenate([completion.logprobs for completion in completions]).astype(np.float32)
        return Rollout(
            completions,
            self.stage.group_size,
            np.concatenate([group.rewards for group in groups]),
            np.concatenate([group.totals for group in groups]),
            logprobs=sampled,
            sampled=sampled,
        )

    # ---- checkpoints -----------------------------------------------------------------------------------

    def begin(self, checkpoint: Path | None, state: Mapping[str, Any] | None, step: int) -> None:
        """Begin anew, or go on after `step` from a checkpoint with what it kept of the rollout under way."""
        self._samples, self._number = [], -1
        if checkpoint is not None and state is not None:
            self.stage.restore(state["stage"])
            self._number = state["rollout"]
            if state["sources"]:
                self._samples = from_arrays(load_file(checkpoint / EXPERIENCE_NAME), state["sources"])
        if self.record is not None:
            self.record.begin(step)

    def state(self) -> dict[str, Any]:
        """JSON values; `arrays` has the rest."""
        return {
            "stage": self.stage.state(),
            "rollout": self._number,
            "sources": sources_of(self._samples),
        }

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """The experience of the rollout under way; nothing between two of them."""
        return to_arrays(self._samples) if self._samples else {}


@dataclass(slots=True)
class _Spent:
    """Seconds of a rollout, and tokens sampled, those of groups that were replaced too."""

    sampling: float = 0.0
    rewards: float = 0.0
    tokens: int = 0


def _as_it_is(sums: torch.Tensor) -> torch.Tensor:
    """Sums over all processes, of each of which has the whole rollout."""
    return sums


def _term(total: float, weight: float = 1.0) -> Term:
    return Term(torch.tensor(total, dtype=torch.float64), torch.tensor(weight, dtype=torch.float64))
