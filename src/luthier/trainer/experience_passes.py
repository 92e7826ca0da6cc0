"""What a rollout leaves to learn from: samples with their signals, cut into optimizer steps and those into passes.

A sample is a prompt with its completions as branches. Where prompts are shared, completions of a prompt stay together
as far as a pass has room for them; elsewhere each is a row of its own. The cut changes memory and no loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from luthier.data.packing import best_fit, by_length
from luthier.experience import Floats, Rollout
from luthier.trainer.rollout_steps import shuffled
from luthier.trainer.steps import NOBODY
from luthier.types import Sample

IDLE = Sample(np.zeros(1, np.int32), np.zeros(1, np.float32), NOBODY)
"""One token that teaches nothing, for a process that has nothing to do while others work."""

Arrays = Mapping[str, np.ndarray[Any, Any]]
_SIGNAL = "signals."


@dataclass(frozen=True, slots=True)
class Piece:
    """Branches [first, last) of sample number `sample`."""

    sample: int
    first: int
    last: int


def learnt_samples(
    rollout: Rollout, learnt: np.ndarray[Any, np.dtype[np.bool_]], signals: Mapping[str, Floats]
) -> list[Sample]:
    """A sample for each prompt with the completions that are learnt from, and their part of the signals (N,)."""
    bounds = np.concatenate(([0], np.cumsum(rollout.lengths)))
    samples = []
    for start in range(0, len(rollout.completions), rollout.group_size):
        chosen = [k for k in range(start, start + rollout.group_size) if learnt[k]]
        if not chosen:
            continue
        prompt = rollout.completions[start].prompt
        answers = [rollout.completions[k].ids for k in chosen]
        tokens = np.concatenate([np.arange(bounds[k], bounds[k + 1]) for k in chosen])
        lengths = [len(prompt.ids), *(len(ids) for ids in answers)]
        samples.append(
            Sample(
                np.concatenate((np.asarray(prompt.ids, np.int32), *answers)).astype(np.int32),
                _weights(lengths[0], sum(lengths[1:])),
                prompt.source,
                prompt.index,
                tuple(np.cumsum(lengths)[:-1].tolist()),
                signals={name: np.asarray(values[tokens], np.float32) for name, values in signals.items()},
            )
        )
    return samples


def _weights(prompt: int, answers: int) -> Floats:
    """Every token of a completion is a target, and none of a prompt."""
    return np.repeat(np.array([0, 1], np.float32), [prompt, answers])


def part_of(sample: Sample, piece: Piece) -> Sample:
    """The prompt with some of its completions."""
    prompt, ends = sample.branches[0], (*sample.branches, len(sample))
    start, stop = ends[piece.first], ends[piece.last]
    branches = np.asarray(sample.branches[piece.first : piece.last]) - start + prompt
    return Sample(
        np.concatenate((sample.input_ids[:prompt], sample.input_ids[start:stop])),
        np.concatenate((sample.weights[:prompt], sample.weights[start:stop])),
        sample.source,
        sample.index,
        tuple(branches.tolist()),
        signals={name: values[start - prompt : stop - prompt] for name, values in sample.signals.items()},
    )


def minibatch(
    samples: Sequence[Sample], update: int, minibatches: int, seed: int, rollout: int
) -> list[Piece]:
    """The completions of one update: those of a prompt in one minibatch, unless there are fewer prompts than these.

    Each time a rollout is gone through has an order of its own. Updates of a small rollout may have nothing.
    """
    epoch, number = divmod(update, minibatches)
    pieces = [Piece(k, 0, len(sample.branches)) for k, sample in enumerate(samples)]
    if len(pieces) < minibatches:
        pieces = [Piece(one.sample, k, k + 1) for one in pieces for k in range(one.last)]
    order = shuffled(len(pieces), seed, "minibatches", rollout, epoch)
    chosen = sorted(np.array_split(np.asarray(order, np.int64), minibatches)[number].tolist())
    return [pieces[k] for k in chosen]


def shared_out(samples: Sequence[Sample], pieces: Sequence[Piece], processes: int) -> list[list[Piece]]:
    """The pieces of each process, so that all have about as many tokens: the longest first, each to whoever has least.

    Fewer pieces than processes are taken apart into completions.
    """
    if processes == 1:
        return [list(pieces)]
    if len(pieces) < processes:
        pieces = [Piece(one.sample, k, k + 1) for one in pieces for k in range(one.first, one.last)]
    sizes = [_size(samples[piece.sample], piece) for piece in pieces]
    shares, loads = [list[int]() for _ in range(processes)], [0] * processes
    for k in sorted(range(len(pieces)), key=lambda k: (-sizes[k], k)):
        least = loads.index(min(loads))
        shares[least].append(k)
        loads[least] += sizes[k]
    return [[pieces[k] for k in sorted(share)] for share in shares]


def cut_passes(
    samples: Sequence[Sample], pieces: Sequence[Piece], limit: int, *, shared: bool, padded: bool
) -> list[list[Piece]]:
    """Passes of at most `limit` tokens, or positions of `padded` rows; one completion alone may be longer."""
    small = [part for piece in pieces for part in _parts(samples[piece.sample], piece, limit, shared)]
    sizes = [_size(samples[piece.sample], piece) for piece in small]
    groups = (by_length if padded else best_fit)(sizes, limit)
    return [[small[k] for k in group] for group in groups]


def _parts(sample: Sample, piece: Piece, limit: int, shared: bool) -> list[Piece]:
    """Pieces that fit into a pass; without shared prompts a completion each."""
    if not shared:
        return [Piece(piece.sample, k, k + 1) for k in range(piece.first, piece.last)]
    parts = [Piece(piece.sample, piece.first, piece.first + 1)]
    for k in range(piece.first + 1, piece.last):
        longer = Piece(piece.sample, parts[-1].first, k + 1)
        if _size(sample, longer) <= limit:
            parts[-1] = longer
        else:
            parts.append(Piece(piece.sample, k, k + 1))
    return parts


def _size(sample: Sample, piece: Piece) -> int:
    """Tokens in a flat row, the prompt computed once: its last token begins every completion (`branch_sizes`)."""
    ends = (*sample.branches, len(sample))
    return sample.branches[0] + ends[piece.last] - ends[piece.first] + piece.last - piece.first - 1


# --------------------------------------------------------------------------------------------------
# Checkpoints


def to_arrays(samples: Sequence[Sample]) -> dict[str, np.ndarray[Any, Any]]:
    """The samples as arrays; `sources_of` has the names that go with them."""
    names = sources_of(samples)
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "input_ids": np.concatenate([sample.input_ids for sample in samples]),
        "lengths": np.array([len(sample) for sample in samples], np.int64),
        "branches": np.concatenate([np.array(sample.branches, np.int64) for sample in samples]),
        "num_branches": np.array([len(sample.branches) for sample in samples], np.int64),
        "source": np.array([names.index(sample.source) for sample in samples], np.int64),
        "index": np.array([sample.index for sample in samples], np.int64),
    }
    for name in samples[0].signals:
        arrays[_SIGNAL + name] = np.concatenate([sample.signals[name] for sample in samples])
    return arrays


def sources_of(samples: Sequence[Sample]) -> list[str]:
    """The data sets of the samples, each once."""
    return list(dict.fromkeys(sample.source for sample in samples))


def from_arrays(arrays: Arrays, sources: Sequence[str]) -> list[Sample]:
    """What `to_arrays` was given."""
    ids = np.split(arrays["input_ids"], np.cumsum(arrays["lengths"])[:-1])
    branches = np.split(arrays["branches"], np.cumsum(arrays["num_branches"])[:-1])
    answered = [len(tokens) - int(ends[0]) for tokens, ends in zip(ids, branches, strict=True)]
    bounds = list(pairwise(np.cumsum([0, *answered]).tolist()))
    signals = {name[len(_SIGNAL) :]: values for name, values in arrays.items() if name.startswith(_SIGNAL)}
    return [
        Sample(
            ids[k],
            _weights(len(ids[k]) - answered[k], answered[k]),
            sources[int(arrays["source"][k])],
            int(arrays["index"][k]),
            tuple(branches[k].tolist()),
            signals={name: values[slice(*bounds[k])] for name, values in signals.items()},
        )
        for k in range(len(ids))
    ]
