"""What an epoch has of each training set."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from luthier.arrange import Material, mixture, training_sets
from luthier.recipe.schema import Recipe


@dataclass(frozen=True, slots=True)
class Share:
    """One training set in the first epoch: its samples, how many of these are different ones, how many there are to
    choose from, and its part of the samples and of the tokens of the epoch, 0 to 1."""

    dataset: str
    samples: int
    different: int
    of: int
    sample_share: float
    token_share: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def shares_of(settings: Recipe, material: Material) -> list[Share]:
    """Of each training set; empty where there is one alone. Raises DataError where they cannot be mixed."""
    names, table = training_sets(settings, material), material.data.train
    if len(names) < 2 or not len(table):
        return []
    visits = mixture(settings, material)
    order = np.arange(len(table)) if visits is None else visits(0)
    times = np.bincount(order, minlength=len(table))
    tokens = times * table.lengths
    found = []
    for name in names:
        members = table.members(name)
        samples = int(times[members].sum())
        share, of_tokens = samples / len(order), float(tokens[members].sum() / tokens.sum())
        different = int((times[members] > 0).sum())
        found.append(Share(name, samples, different, len(members), share, of_tokens))
    return found
