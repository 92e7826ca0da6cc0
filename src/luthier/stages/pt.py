"""Continued pre-training: every token of plain text is a target."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from luthier.data.collate import flat_batch
from luthier.data.encode import EncodeOptions, pt_samples
from luthier.recipe.schema import PtSpec
from luthier.stages.supervised import Separable, negative_log_likelihood, supervised_weights
from luthier.types import (
    Batch,
    LossSum,
    ModelKind,
    Observed,
    Policy,
    RowKind,
    Sample,
)


class Pretraining(Separable):
    """Next-token prediction on documents (Radford et al., 2018); each ends with the end token."""

    name = "pt"
    kind: RowKind = "text"
    model: ModelKind = "language"
    needs_reference = False
    terms: tuple[str, ...] = ("loss",)
    is_likelihood = True

    def __init__(self, spec: PtSpec, options: EncodeOptions, *, share_prompts: bool = False) -> None:
        self.spec, self.options = spec, options
        self.encode = partial(pt_samples, options=self.options)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        return flat_batch(samples)

    def weight(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": supervised_weights(batch).sum()}

    def loss(self, policy: Policy, batch: Batch, observed: Observed) -> LossSum:
        return negative_log_likelihood(policy, batch, self.spec.label_smoothing)
