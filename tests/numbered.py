"""A stage's `encode` without a model; a module of its own, so that a worker has little to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.types import Encoded, Lost, Row, Sample


@dataclass(frozen=True)
class Numbers:
    """Encodes row i as `least` + i % `most` tokens, all of them its number; every `lost`-th row is dropped."""

    most: int = 9
    lost: int = 0
    least: int = 1

    def __call__(self, row: Row, template: Any) -> Encoded:
        number = int("".join(filter(str.isdigit, row.text or "")))
        if self.lost and number % self.lost == 0:
            return Encoded(lost=Lost(dropped="unlucky"))
        ids = np.full(self.least + number % self.most, number, np.int32)
        return Encoded((Sample(ids, np.ones(len(ids), np.float32), row.source, row.index),))
