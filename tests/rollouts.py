"""Rollouts written by hand, what is learnt of them, and a policy whose numbers are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from threading import Barrier, Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier.conversations import Conversation
from luthier.experience import Completion, Prompt, Rollout
from luthier.stages.advantages import alone
from luthier.types import Batch, Sample, TokenLogprobs

EXACT = {"type": "exact_match"}
"""A reward, for stages that want one to be named."""


def made_rollout(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    totals: Sequence[float],
    *,
    truncated: Sequence[int] = (),
    rewards: Sequence[Sequence[float]] | None = None,
    logprobs: Sequence[float] | None = None,
    sampled: Sequence[float] | None = None,
    reference: Sequence[float] | None = None,
    values: Sequence[float] | None = None,
) -> Rollout:
    """The answers to each prompt stand beside each other; `truncated` are the numbers of those that were cut."""
    size = len(answers) // len(prompts)
    asked = [Prompt("made", index, tuple(ids), Conversation(())) for index, ids in enumerate(prompts)]
    completions = tuple(
        Completion(
            asked[number // size],
            np.array(ids, np.int32),
            np.zeros(len(ids), np.float32),
            "",
            "length" if number in truncated else "stop",
        )
        for number, ids in enumerate(answers)
    )
    num_tokens = sum(map(len, answers))

    def floats(given: Sequence[float] | None) -> Any:
        return None if given is None else np.array(given, np.float32)

    by_function = np.array([[total] for total in totals] if rewards is None else rewards, np.float32)
    own = np.zeros(num_tokens, np.float32) if logprobs is None else floats(logprobs)
    return Rollout(
        completions,
        size,
        by_function,
        np.array(totals, np.float32),
        own,
        own if sampled is None else floats(sampled),
        floats(reference),
        floats(values),
    )


def random_rollout(
    num_prompts: int,
    group_size: int,
    *,
    vocab: int = 97,
    seed: int = 0,
    longest: int = 6,
    spread: float = 0.3,
) -> Rollout:
    """Everything known of random tokens; log-probabilities of policy, engine and reference are `spread` apart."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, vocab, n).tolist() for n in rng.integers(1, 6, num_prompts)]
    answers = [
        rng.integers(3, vocab, n).tolist() for n in rng.integers(1, longest + 1, num_prompts * group_size)
    ]
    num_tokens = sum(map(len, answers))
    own = rng.normal(-2, 1, num_tokens)
    return made_rollout(
        prompts,
        answers,
        rng.normal(0, 1, len(answers)).tolist(),
        logprobs=own.tolist(),
        sampled=(own + rng.normal(0, spread, num_tokens)).tolist(),
        reference=(own + rng.normal(0, spread, num_tokens)).tolist(),
        values=rng.normal(0, 1, num_tokens).tolist(),
    )


def learnt_samples(stage: Any, rollout: Rollout, signals: Mapping[str, Tensor]) -> list[Sample]:
    """A sample for each prompt, its learnt answers as branches; `place` is where a token stands in the rollout."""
    bounds = np.cumsum([0, *rollout.lengths])
    known = {name: values.numpy() for name, values in signals.items()}
    known["place"] = np.arange(bounds[-1], dtype=np.float32)
    learnt, samples = stage.learnt(rollout), []
    for start in range(0, len(rollout.completions), rollout.group_size):
        chosen = [k for k in range(start, start + rollout.group_size) if learnt[k]]
        if not chosen:
            continue
        prompt = rollout.completions[start].prompt
        parts = [np.array(prompt.ids, np.int32), *(rollout.completions[k].ids for k in chosen)]
        places = np.concatenate([np.arange(bounds[k], bounds[k + 1]) for k in chosen])
        ends = np.cumsum([len(part) for part in parts])
        weights = np.repeat(np.float32([0, 1]), [ends[0], ends[-1] - ends[0]])
        samples.append(
            Sample(
                np.concatenate(parts),
                weights,
                "made",
                prompt.index,
                tuple(ends[:-1].tolist()),
                signals={name: np.float32(values[places]) for name, values in known.items()},
            )
        )
    return samples


def single_answers(samples: Sequence[Sample]) -> list[Sample]:
    """Every answer as a sample of its own, with a copy of the prompt and its part of the signals."""
    found = []
    for sample in samples:
        prompt, bounds = sample.branches[0], (*sample.branches, len(sample))
        for start, stop in pairwise(bounds):
            keep = np.r_[0:prompt, start:stop]
            own = {name: values[start - prompt : stop - prompt] for name, values in sample.signals.items()}
            found.append(
                replace(
                    sample,
                    input_ids=sample.input_ids[keep],
                    weights=sample.weights[keep],
                    branches=(prompt,),
                    signals=own,
                )
            )
    return found


@dataclass
class GivenPolicy:
    """A policy whose numbers of every token of a rollout are given, and can be learnt."""

    logprobs_N: Tensor
    entropy_N: Tensor
    values_N: Tensor | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)

    def logprobs(
        self,
        batch: Batch,
        *,
        entropy: bool = False,
        values: bool = False,
        temperature: float = 1.0,
        **others: Any,
    ) -> TokenLogprobs:
        self.asked.append({"entropy": entropy, "values": values, "temperature": temperature, **others})
        places = batch.signals["place"].long() if batch.signals else torch.zeros(0, dtype=torch.int64)
        return TokenLogprobs(
            self.logprobs_N[places],
            entropy=self.entropy_N[places] if entropy else None,
            values=self.values_N[places] if values and self.values_N is not None else None,
        )


def together(parts: Sequence[Any], function: Callable[[Any, Callable[[Tensor], Tensor]], Any]) -> list[Any]:
    """`function(part, total)` of every part at once, as processes whose sums are added."""
    if len(parts) == 1:
        return [function(parts[0], alone)]
    barrier, sums, results = Barrier(len(parts)), [torch.zeros(0)] * len(parts), [None] * len(parts)

    def run(rank: int) -> None:
        def total(own: Tensor) -> Tensor:
            sums[rank] = own
            barrier.wait()
            added = torch.stack(list(sums)).sum(0)
            barrier.wait()
            return added

        results[rank] = function(parts[rank], total)

    threads = [Thread(target=run, args=(rank,)) for rank in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return results
