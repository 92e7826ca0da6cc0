"""The reference's log-probabilities of all samples before training, so that its model need not stay.

The same numbers as those computed during training, up to rounding: other samples share a pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from luthier.data.batching import Lengths
from luthier.data.collate import branch_batch
from luthier.data.packing import best_fit, by_length
from luthier.data.reference_cache import Logprobs, ReferenceCache, Referenced, sample_key
from luthier.model.logprobs import ModelPolicy
from luthier.model.reference import Reference
from luthier.trainer.processes import ALONE, Processes
from luthier.types import IGNORE_INDEX, Batch, Sample

_WRITE_EVERY = 60.0
"""Seconds of work that a kill may cost."""


@dataclass(frozen=True, slots=True)
class Precomputation:
    """How samples become `Referenced`.

    cache: where the numbers are kept. reference: makes the model, asked for only where a number is missing; it is
    called with `model`, the policy before its first step. tokens_per_pass bounds memory. share_prompts and padded are
    the layout of the model's rows. say: told how far it is.
    """

    cache: ReferenceCache
    reference: Callable[[], Reference]
    model: nn.Module
    device: torch.device
    arithmetic: torch.dtype | None
    tokens_per_pass: int
    share_prompts: bool
    padded: bool
    say: Callable[[str], None]
    processes: Processes = ALONE

    def __call__(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        """The samples with the reference's log-probabilities, computed as far as the cache has none.

        Of several processes each computes its share of what any of them lacks; all of them call this.
        """
        keys = [sample_key(sample) for sample in samples]
        known, missing = self._load(keys)
        if missing:
            own = dict(self.processes.share(list(missing.items())))
            self.processes.together(partial(self._compute, samples, own))
            known, lacking = self._load(keys)
            if lacking:  # on another machine's disk
                for part in self.processes.exchange({key: known[key] for key in lacking if key in own}):
                    known |= part
        return Referenced(samples, [known[key] for key in keys])

    def _load(self, keys: Sequence[bytes]) -> tuple[dict[bytes, Logprobs], dict[bytes, int]]:
        """What is on this process's disk, and the numbers of the samples that it, or any other one, has not."""
        known = self.cache.load()
        lacking = [number for number, key in enumerate(keys) if key not in known]
        of_any = sorted({number for part in self.processes.exchange(lacking) for number in part})
        return known, {keys[number]: number for number in reversed(of_any)}

    def _compute(self, samples: Sequence[Sample], missing: dict[bytes, int]) -> None:
        if not missing:
            return
        keys, numbers = list(missing), list(missing.values())
        policy = ModelPolicy(self.model, self.arithmetic, reference=self.reference())
        self.say(f"computing the reference's log-probabilities of {len(numbers):,} samples, once")
        sizes = _sizes([samples[i] for i in numbers], self.share_prompts, self.padded)
        groups = (by_length if self.padded else best_fit)(sizes.tolist(), self.tokens_per_pass)
        written, done, entries = time.monotonic(), 0, list[tuple[bytes, Logprobs]]()
        for group in groups:
            batch = branch_batch([samples[numbers[i]] for i in group], share_prompts=self.share_prompts).to(
                self.device
            )
            answers = _by_sample(batch, policy.reference_logprobs(batch), len(group))
            entries += [(keys[i], values) for i, values in zip(group, answers, strict=True)]
            done += len(group)
            if time.monotonic() - written > _WRITE_EVERY:
                self.cache.add(entries)
                self.say(f"reference: {done:,} of {len(numbers):,} samples")
                written, entries = time.monotonic(), []
        if entries:
            self.cache.add(entries)


def _sizes(samples: Sequence[Sample], share_prompts: bool, padded: bool) -> Lengths:
    """(n,) tokens, or positions of padded rows, that each sample takes of a pass."""
    sizes = []
    for sample in samples:
        prompt, count = sample.branches[0], len(sample.branches)
        whole = len(sample) + count - 1 if share_prompts else len(sample) + (count - 1) * prompt
        sizes.append(count * len(sample) if padded else whole)
    return np.array(sizes, np.int64)


def _by_sample(batch: Batch, logprobs_N: torch.Tensor, num_samples: int) -> list[Logprobs]:
    """The targets' numbers of each sample, its branches one after the other."""
    assert batch.rows is not None
    supervised_N = (batch.targets != IGNORE_INDEX).nonzero()[:, 0]
    segments_N = torch.searchsorted(batch.cu_seqlens[1:].long(), supervised_N, right=True)
    counts_R = torch.bincount(segments_N, minlength=batch.num_segments)[batch.rows].tolist()
    rows = np.split(logprobs_N.float().cpu().numpy(), np.cumsum(counts_R)[:-1])
    return [np.concatenate(rows[i::num_samples]) for i in range(num_samples)]
