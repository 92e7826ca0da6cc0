"""Several data sets in turns: which one gives the next sample. Pure functions of sizes, seed and epoch.

    shares(spec, names, sizes)              -> how many samples of each set an epoch has
    turns(spec, names, sizes, seed, epoch)  -> whose turn it is, one after the other
    epoch_visits(spec, members, seed, epoch, shuffle)
                                            -> the samples of an epoch in the order of turns
    mixed_rows(spec, sizes, seed)           -> the rows of LLaMA-Factory's merged data set

Shares are kept exactly, not on average: an epoch holds a fixed number of samples of each set, and turns space them
evenly over it. `probabilities` alone draws at random.
"""

from __future__ import annotations

import difflib
import heapq
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import chain, repeat
from typing import Any

import numpy as np

from luthier.recipe.mixture import MixSpec
from luthier.types import DataError

Int64 = np.ndarray[Any, np.dtype[np.int64]]

_BLOCK = 1000
"""Draws at once."""


def turns(
    spec: MixSpec, names: Sequence[str], sizes: Sequence[int] | None, *, seed: int, epoch: int
) -> Generator[int, int | None, None]:
    """The number of the set that gives the next sample, again and again until the epoch ends.

    `sizes` are the samples of each set. Where they are None, sets are streams, and the caller says that set i is empty
    by `send(i)` in place of `next`, as soon as the last sample of it was given; where the spec repeats smaller sets, i
    goes on to have turns and starts anew. `until: total` never ends then. The order of turns is the same in every
    epoch; which samples a set gives is the caller's business.

    Raises DataError for names and sizes that the spec does not fit.
    """
    check_mix(spec, names, sizes)
    if spec.probabilities is not None:
        draws = _draws(spec.probabilities, seed)
        return _until_empty(draws, len(names), spec.end, sizes)
    if sizes is not None or spec.counts is not None:
        counts = shares(spec, names, sizes)
        speeds = _speeds(spec, names, sizes or (), counts)
        return _counted(spec, speeds, counts)
    if spec.strategy == "concat" and spec.weights is None:
        return _one_by_one(len(names))
    return _until_empty(_even(_speeds(spec, names, (), ())), len(names), spec.end, None)


def shares(spec: MixSpec, names: Sequence[str], sizes: Sequence[int] | None) -> list[int]:
    """How many samples of each set an epoch has; with `probabilities` they depend on the draws and are counted.

    With shares p_i and sizes n_i an epoch has N samples: floor(min n_i / p_i) until the first set is used up, ceil(max
    n_i / p_i) until all are, sum n_i in total. N is apportioned by largest remainders, so that every count is p_i N
    rounded up or down. Temperature: p_i = n_i^(1/T) / sum n_j^(1/T), Conneau et al. (2020, arXiv:1911.02116), Xue et
    al. (2021, arXiv:2010.11934), where 1/T is called alpha. Raises DataError as `turns`.
    """
    check_mix(spec, names, sizes)
    if spec.counts is not None:
        known = dict(zip(names, sizes, strict=True)) if sizes is not None else {}
        return [int((known | spec.counts)[name]) for name in names]
    assert sizes is not None
    if spec.end == "once":
        return list(sizes)
    if spec.weights is None and spec.temperature is None:
        return [min(sizes) if spec.end == "first" else max(sizes)] * len(sizes)
    weights = _weights(spec, names, sizes)
    whole = sum(weights)
    if spec.end == "first":
        total = min(int(size * whole / weight) for size, weight in zip(sizes, weights, strict=True))
    elif spec.end == "all":
        total = max(-int(-size * whole // weight) for size, weight in zip(sizes, weights, strict=True))
    else:
        total = sum(sizes)
    found = _apportioned(total, weights)
    return [min(n, size) for n, size in zip(found, sizes, strict=True)] if spec.end == "first" else found


def epoch_visits(
    spec: MixSpec, members: Mapping[str, Int64], *, seed: int, epoch: int, shuffle: bool
) -> Int64:
    """(N,) the samples of an epoch in the order of turns; `members` are those of each set by its name.

    Each set is gone through from its beginning to its end, again and again, without regard to where epochs end: what is
    left of a set after one epoch comes first in the next. With `shuffle` every time in a new random order; without, in
    its own. Raises DataError as `turns`.
    """
    names, sizes = list(members), [len(samples) for samples in members.values()]
    if spec.probabilities is None and shuffle:  # nobody sees whose turn it was
        order = np.repeat(np.arange(len(names)), shares(spec, names, sizes))
    else:
        order = np.fromiter(turns(spec, names, sizes, seed=seed, epoch=epoch), np.int64)
    visits = np.empty(len(order), np.int64)
    for number, samples in enumerate(members.values()):
        places = np.flatnonzero(order == number)
        if len(places):
            start = epoch * len(places)
            visits[places] = _endless(samples, start, start + len(places), [seed, number], shuffle)
    return visits


def _endless(samples: Int64, start: int, stop: int, seed: Sequence[int], shuffle: bool) -> Int64:
    """Samples [start, stop) of the endless repetition of a set."""
    size = len(samples)
    rounds = range(start // size, (stop - 1) // size + 1)
    orders = [
        np.random.default_rng([*seed, i]).permutation(size) if shuffle else np.arange(size) for i in rounds
    ]
    skipped = rounds.start * size
    return samples[np.concatenate(orders)[start - skipped : stop - skipped]]


def mixed_rows(spec: MixSpec, names: Sequence[str], sizes: Sequence[int], *, seed: int) -> Int64:
    """(N,) rows of `datasets.interleave_datasets`, numbered as if the sets stood one after the other.

    The same in every epoch; a set that is used up starts anew where the spec repeats it. Raises DataError as `turns`.
    """
    order = np.fromiter(turns(spec, names, sizes, seed=seed, epoch=0), np.int64)
    rows = np.empty(len(order), np.int64)
    offset = 0
    for number, size in enumerate(sizes):
        places = np.flatnonzero(order == number)
        rows[places] = offset + np.arange(len(places)) % max(size, 1)
        offset += size
    return rows


def check_mix(spec: MixSpec, names: Sequence[str], sizes: Sequence[int] | None) -> None:
    """Raise DataError where the spec names other sets than `names`, or where their sizes cannot be mixed as it says."""
    for key, table in (("weights", spec.weights), ("counts", spec.counts)):
        for name in table or ():
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise DataError(f"data.mix.{key}: {name!r} is no training set{hint}")
    missing = [name for name in names if spec.weights is not None and name not in spec.weights]
    if missing:
        raise DataError(f"data.mix.weights: {missing[0]!r} has none; give every training set a weight")
    if spec.probabilities is not None and len(spec.probabilities) != len(names):
        raise DataError(
            f"data.mix.probabilities: there are {len(spec.probabilities)} for {len(names)} training sets; give each one"
        )
    if sizes is None:
        _check_streams(spec, names)
    elif not spec.is_plain:
        _check_sizes(spec, names, sizes)


def _check_streams(spec: MixSpec, names: Sequence[str]) -> None:
    if spec.temperature is not None:
        raise DataError(
            "data.mix.temperature needs the sizes of the sets, which are not known in a stream; give data.mix.weights"
        )
    unnamed = [name for name in names if spec.counts is not None and name not in spec.counts]
    if unnamed:
        raise DataError(
            f"data.mix.counts: {unnamed[0]!r} has none, and the size of a stream is not known; give one"
        )


def _check_sizes(spec: MixSpec, names: Sequence[str], sizes: Sequence[int]) -> None:
    for number, (name, size) in enumerate(zip(names, sizes, strict=True)):
        never = spec.probabilities is not None and spec.probabilities[number] == 0
        if never and size and spec.end != "first":
            raise DataError(
                f"data.mix.probabilities: {name!r} has 0 and can never be used up; remove it from data.train"
            )
        wanted = spec.counts is None or name in spec.counts
        if not size and wanted and not never and (spec.end != "once" or spec.counts is not None):
            raise DataError(f"data.mix: data set {name!r} has no samples that could be mixed")


def _weights(spec: MixSpec, names: Sequence[str], sizes: Sequence[int]) -> list[Fraction]:
    if spec.weights is not None:
        return [Fraction(spec.weights[name]) for name in names]
    assert spec.temperature is not None
    # Sizes are divided by the largest, whose power could overflow.
    return [Fraction((size / max(sizes)) ** (1 / spec.temperature)) for size in sizes]


def _apportioned(total: int, weights: Sequence[Fraction]) -> list[int]:
    """`total` in parts proportional to `weights`, each rounded up or down (Hamilton's method of largest remainders)."""
    whole = sum(weights)
    exact = [weight * total / whole for weight in weights]
    parts = [int(part) for part in exact]
    order = sorted(range(len(parts)), key=lambda i: (parts[i] - exact[i], i))
    for i in order[: total - sum(parts)]:
        parts[i] += 1
    return parts


def _speeds(
    spec: MixSpec, names: Sequence[str], sizes: Sequence[int], counts: Sequence[int]
) -> list[Fraction]:
    """How often each set has its turn in relation to the others; without sizes, in streams."""
    if spec.counts is not None:
        return [Fraction(count) for count in counts]
    if sizes and spec.end != "once":
        return [Fraction(max(count, 1)) for count in counts]
    if spec.weights is None and spec.temperature is None:
        return [Fraction(1)] * len(names)
    return _weights(spec, names, sizes)


def _even(speeds: Sequence[Fraction]) -> Iterator[int]:
    """Turns without an end: sample k of set i at the time (k + 1/2) / speed i, the first set where times are equal."""
    unit = 2 * math.lcm(*(speed.numerator for speed in speeds))  # times are whole numbers of it
    steps = [unit * speed.denominator // speed.numerator for speed in speeds]
    times = [(step // 2, i) for i, step in enumerate(steps)]
    heapq.heapify(times)
    while True:
        time, i = times[0]
        yield i
        heapq.heapreplace(times, (time + steps[i], i))


def _counted(
    spec: MixSpec, speeds: Sequence[Fraction], counts: Sequence[int]
) -> Generator[int, int | None, None]:
    if spec.strategy == "concat":
        for i in chain.from_iterable(repeat(i, count) for i, count in enumerate(counts)):
            yield i  # by a loop of its own, to which the caller may send
        return
    left, missing = list(counts), sum(counts)
    for i in _even(speeds):
        if not missing:
            return
        if left[i]:
            left[i] -= 1
            missing -= 1
            yield i


def _one_by_one(num_sets: int) -> Generator[int, int | None, None]:
    for number in range(num_sets):
        while (yield number) != number:
            pass


def _draws(probabilities: Sequence[float], seed: int) -> Iterator[int]:
    generator = np.random.default_rng(seed)
    while True:
        yield from generator.choice(len(probabilities), size=_BLOCK, p=list(probabilities)).tolist()


def _until_empty(
    order: Iterator[int], num_sets: int, end: str, sizes: Sequence[int] | None
) -> Generator[int, int | None, None]:
    """The order until as many sets are used up as `end` says; with `once`, those are passed over."""
    given, empty = [0] * num_sets, {i for i, size in enumerate(sizes or ()) if not size}
    needed = {"first": 1, "total": num_sets + 1}.get(end, num_sets)
    if end == "first":
        empty = set()
    while len(empty) < needed:
        number = next(order)
        if end == "once" and number in empty:
            continue
        said = yield number
        given[number] += 1
        if said is not None or (sizes is not None and given[number] >= sizes[number]):
            empty.add(number if said is None else said)
