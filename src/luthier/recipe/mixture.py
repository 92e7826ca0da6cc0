"""How several data sets become one."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, field_validator, model_validator

from luthier.recipe.base import Spec


class MixSpec(Spec):
    strategy: Literal["concat", "interleave"] = "concat"
    """One set after the other, or in turns. With `data.shuffle` the order within an epoch is random all the same."""
    weights: dict[str, float] | None = None
    """Share of each training set in an epoch, by its name; any positive numbers, they are divided by their sum."""
    temperature: float | None = Field(default=None, gt=0)
    """Shares proportional to size ** (1 / temperature): 1 keeps the sizes, a high one makes all sets equal."""
    counts: dict[str, int] | None = None
    """Samples of each training set in an epoch, by its name; a set that is not named comes whole."""
    until: Literal["first", "all", "once", "total"] | None = None
    """Where an epoch ends: when the `first` set is used up, when `all` are (smaller ones repeat), when each sample was
    seen `once`, or at as many as the sets have in `total`. Absent: `total` with shares, else `once`."""
    probabilities: tuple[float, ...] | None = None
    """Draw whose turn it is at random, one for each of data.train in its order, as `datasets.interleave_datasets`."""

    @field_validator("weights", "counts")
    @classmethod
    def _positive(cls, values: dict[str, float] | None) -> dict[str, float] | None:
        for name, value in (values or {}).items():
            if value <= 0:
                raise ValueError(
                    f"{name}: {value:g} should be greater than 0; remove the set from data.train instead"
                )
        if values is not None and not values:
            raise ValueError("should name at least one data set")
        return values

    @field_validator("probabilities")
    @classmethod
    def _sum_to_one(cls, values: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if values is None:
            return None
        if any(value < 0 for value in values):
            raise ValueError("should be numbers from 0 to 1")
        if not math.isclose(sum(values), 1.0, rel_tol=0, abs_tol=1e-8):  # what NumPy's `choice` allows
            raise ValueError(f"should sum to 1, and sum to {sum(values):.10g}")
        return values

    @model_validator(mode="after")
    def _one_way(self) -> MixSpec:
        given = [
            key
            for key in ("weights", "temperature", "counts", "probabilities")
            if getattr(self, key) is not None
        ]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} both say how much of each set there is; keep one")
        if self.probabilities is not None and (self.strategy != "interleave" or self.until == "total"):
            raise ValueError("probabilities go with strategy: interleave and until: first, all or once")
        if self.counts is not None and self.until is not None:
            raise ValueError("counts say where an epoch ends; remove until")
        if self.until is not None and self.strategy == "concat" and not given:
            raise ValueError("until goes with strategy: interleave, weights or temperature")
        return self

    @property
    def end(self) -> Literal["first", "all", "once", "total"]:
        """`until`, what is absent filled in."""
        if self.until is not None:
            return self.until
        return "total" if self.weights is not None or self.temperature is not None else "once"

    @property
    def is_plain(self) -> bool:
        """Whether every set comes whole, one after the other."""
        return self == MixSpec()
