"""The plan of an epoch: steps -> ranks -> passes -> sample indices.

A *step* is what one optimizer step sees, all processes together. It is divided among *ranks*, and a rank's
share is cut into *passes*, each of which goes through the model at once. Division and passes bound memory and
spread work; because losses are sums over the whole step, they cannot change the result.

Every process computes the same plan from the same numbers; nothing is communicated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, overload

import numpy as np

from luthier.data.packing import balanced, best_fit, by_length, exactly, in_order

Step = list[list[list[int]]]
Lengths = np.ndarray[Any, np.dtype[np.int64]]
Visits = Callable[[int], Lengths]
"""Epoch -> the samples that it visits, in order; as many in each, a sample perhaps never or several times."""


@dataclass(frozen=True, slots=True)
class RowsRule:
    """`rows` rows per device and micro-batch, `accumulation` micro-batches per step."""

    rows: int
    accumulation: int = 1


@dataclass(frozen=True, slots=True)
class TokensRule:
    """At most `tokens` real tokens in a step, all processes together."""

    tokens: int


@dataclass(frozen=True, slots=True)
class EpochPlan(Sequence[Step]):
    """The steps of one epoch; `plan[s][r][p]` are the sample indices of pass p of rank r in step s.

    Every rank has the same number of passes in a step; a rank with fewer has empty ones, for which it runs a
    dummy forward. `units[s]` are the samples of step s, one list for each micro-batch (rows rule) or one list
    (tokens rule).
    """

    lengths: Lengths
    units: list[list[list[int]]]
    rule: RowsRule | TokensRule
    world_size: int
    tokens_per_pass: int | None
    padded: bool = False
    """Whether each sample becomes a row as long as the longest of its pass; `tokens_per_pass` then counts padding."""
    sizes: Lengths | None = None
    """What each sample takes of `tokens_per_pass` where that is not its length (`branch_sizes`)."""

    def __len__(self) -> int:
        return len(self.units)

    @overload
    def __getitem__(self, step: int) -> Step: ...
    @overload
    def __getitem__(self, step: slice) -> list[Step]: ...
    def __getitem__(self, step: int | slice) -> Step | list[Step]:
        if isinstance(step, slice):
            return [self[i] for i in range(*step.indices(len(self)))]
        ranks = [self._passes(batches) for batches in self._ranks(self.units[step])]
        most = max(len(passes) for passes in ranks)
        return [passes + [[] for _ in range(most - len(passes))] for passes in ranks]

    def tokens(self, step: int) -> int:
        """Real tokens of a step, all ranks together."""
        return int(sum(self.lengths[batch].sum() for batch in self.units[step] if batch))

    def padding_share(self) -> float:
        """The part of all positions that is padding, 0 to 1; 0 where rows are flat."""
        if not self.padded:
            return 0.0
        sizes = self.lengths if self.sizes is None else self.sizes
        passes = [indices for step in self for rank in step for indices in rank if indices]
        positions = sum(len(indices) * int(sizes[indices].max()) for indices in passes)
        real = sum(int(self.lengths[indices].sum()) for indices in passes)
        return 1.0 - real / positions if positions else 0.0

    def _ranks(self, batches: list[list[int]]) -> list[list[list[int]]]:
        if isinstance(self.rule, RowsRule):
            return [batches[rank :: self.world_size] for rank in range(self.world_size)]
        samples = [index for batch in batches for index in batch]
        shares = balanced([int(self.lengths[i]) for i in samples], self.world_size)
        return [[[samples[i] for i in share]] if share else [] for share in shares]

    def _passes(self, batches: list[list[int]]) -> list[list[int]]:
        """A rank's micro-batches as they are, or regrouped to at most `tokens_per_pass` tokens each."""
        if self.tokens_per_pass is None:
            return batches
        samples = [index for batch in batches for index in batch]
        sizes = self.lengths if self.sizes is None else self.sizes
        lengths = [int(sizes[i]) for i in samples]
        groups = (by_length if self.padded else best_fit)(lengths, self.tokens_per_pass)
        return [[samples[i] for i in group] for group in groups]


def plan_epoch(
    lengths: Sequence[int] | Lengths,
    *,
    rule: RowsRule | TokensRule,
    epoch: int,
    seed: int,
    shuffle: bool = True,
    world_size: int = 1,
    tokens_per_pass: int | None = None,
    groups: Sequence[Sequence[int]] | None = None,
    padded: bool = False,
    sizes: Lengths | None = None,
    visits: Visits | None = None,
    row_tokens: int | None = None,
) -> EpochPlan:
    """The plan of epoch `epoch` (from 0) over samples of the given lengths.

    Rows rule. The order is the one in which transformers' Trainer visits rows with this seed: a permutation
    by a torch generator seeded with `seed + epoch` (accelerate's `SeedableRandomSampler`). Consecutive rows
    form micro-batches, micro-batch j goes to rank j modulo world size, and `accumulation` of them per rank
    form a step. What is left at the end of the epoch is a smaller step; no row is visited twice to fill it,
    so some ranks may get nothing. With `groups` (packing), a row is a whole group of samples.

    Tokens rule. Samples are put into steps once, for all epochs: in an order shuffled by `seed`, each goes
    into the fullest step that has room for it. An epoch only changes the order of the steps. So every epoch
    has the same number of steps, and schedules and resuming can count on it; regrouping in every epoch could
    not promise that. A sample longer than `tokens` is a step of its own. Without `shuffle`, samples stay in
    order and a step takes as many as fit. `groups` has no meaning here, as steps are already packed by
    tokens.

    `visits`: an epoch takes these samples in place of all, once each. Where they differ between epochs, so do lengths,
    and steps are put together anew in each. There are as many as in epoch 0: where one too few would be needed, the
    largest are halved; where one too many, `tokens` grows by as little as lets them suffice. `row_tokens` packs them
    into rows of so many tokens (rows rule), of which there are as many in every epoch in the same way.

    Both rules count real tokens. With `padded`, samples of like length share a pass, so that its rows times its
    longest row stay within `tokens_per_pass`; what is in a step does not change. `sizes` (n,) says what samples take
    of a pass where that is not their length.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    units = (
        _row_steps(
            _rows(lengths, epoch, shuffle, groups, visits, row_tokens),
            rule,
            epoch,
            seed,
            shuffle,
            world_size,
        )
        if isinstance(rule, RowsRule)
        else _token_steps(lengths, rule, epoch, seed, shuffle)
        if visits is None
        else _visited_steps(lengths, rule, epoch, seed, shuffle, visits)
    )
    return EpochPlan(lengths, units, rule, world_size, tokens_per_pass, padded, sizes)


def branch_sizes(
    lengths: Lengths,
    prompt_lengths: Lengths,
    row_lengths: Lengths,
    num_branches: Lengths,
    *,
    shared: bool,
    padded: bool = False,
) -> Lengths:
    """(n,) tokens that samples with branches take in a flat row, their prompts computed once (`shared`) or for every
    branch; with `padded`, the positions of their rows. The arrays are those of a `SampleTable`."""
    branches = np.maximum(num_branches, 1)
    answers = lengths - prompt_lengths
    if padded:
        sizes = branches * row_lengths
    elif shared:
        sizes = np.where(num_branches > 0, lengths + branches - 1, lengths)
    else:
        sizes = np.where(num_branches > 0, branches * prompt_lengths + answers, lengths)
    return sizes.astype(np.int64)


def _rows(
    lengths: Lengths,
    epoch: int,
    shuffle: bool,
    groups: Sequence[Sequence[int]] | None,
    visits: Visits | None,
    row_tokens: int | None,
) -> Sequence[Sequence[int]]:
    """The samples of each row of an epoch."""
    if visits is None:
        return [[i] for i in range(len(lengths))] if groups is None else groups
    if row_tokens is None:
        return [[i] for i in visits(epoch).tolist()]
    return _regrouped(lengths, visits, epoch, row_tokens, best_fit if shuffle else in_order)


def _regrouped(
    lengths: Lengths,
    visits: Visits,
    epoch: int,
    capacity: int,
    pack: Callable[[Sequence[int], int], list[list[int]]],
) -> list[list[int]]:
    """The samples of an epoch in as many groups as those of the first one."""
    first, order = visits(0), visits(epoch)
    count = len(pack(lengths[first].tolist(), capacity))
    groups = exactly(count, lengths[order].tolist(), capacity, pack)
    return [order[group].tolist() for group in groups]


def _row_steps(
    rows: Sequence[Sequence[int]],
    rule: RowsRule,
    epoch: int,
    seed: int,
    shuffle: bool,
    world_size: int,
) -> list[list[list[int]]]:
    num_rows = len(rows)
    order = _permutation(num_rows, seed + epoch) if shuffle else range(num_rows)
    rows = [rows[row] for row in order]
    batches = [
        [index for row in rows[start : start + rule.rows] for index in row]
        for start in range(0, num_rows, rule.rows)
    ]
    window = rule.accumulation * world_size
    return [batches[start : start + window] for start in range(0, len(batches), window)]


def _token_steps(
    lengths: Lengths, rule: TokensRule, epoch: int, seed: int, shuffle: bool
) -> list[list[list[int]]]:
    if not shuffle:
        return [[group] for group in in_order(lengths.tolist(), rule.tokens)]
    order = _permutation(len(lengths), seed)
    groups = best_fit([int(lengths[i]) for i in order], rule.tokens, decreasing=False)
    turn = _permutation(len(groups), seed + epoch)
    return [[[order[i] for i in groups[g]]] for g in turn]


def _visited_steps(
    lengths: Lengths, rule: TokensRule, epoch: int, seed: int, shuffle: bool, visits: Visits
) -> list[list[list[int]]]:
    if not shuffle:
        return [[group] for group in _regrouped(lengths, visits, epoch, rule.tokens, in_order)]

    def mixed(number: int) -> Lengths:
        order = visits(number)
        return order[_permutation(len(order), seed + number)]

    pack = partial(best_fit, decreasing=False)
    groups = _regrouped(lengths, mixed, epoch, rule.tokens, pack)
    return [[groups[g]] for g in _permutation(len(groups), seed + epoch)]


def _permutation(n: int, seed: int) -> list[int]:
    """The order of torch's RandomSampler with a generator of this seed."""
    import torch

    generator = torch.Generator()
    generator.manual_seed(seed)
    order: list[int] = torch.randperm(n, generator=generator).tolist()
    return order
